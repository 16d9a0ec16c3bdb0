// The compiler accepts functions without a body, here those of the runtime that
// fork.go links to, only in a package with an assembly file.
