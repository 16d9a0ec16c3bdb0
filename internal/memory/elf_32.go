//go:build 386 || arm || mips || mipsle

package memory

// programHeader is Elf32_Phdr.
type programHeader struct {
	Type                  uint32
	_, Vaddr, _, _, Memsz uintptr
	Flags                 uint32
	_                     uintptr
}
