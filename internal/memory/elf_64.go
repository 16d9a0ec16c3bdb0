//go:build !(386 || arm || mips || mipsle)

package memory

// programHeader is Elf64_Phdr.
type programHeader struct {
	Type, Flags           uint32
	_, Vaddr, _, _, Memsz uintptr
	_                     uintptr
}
