// Command usernet gives a network namespace a network, without privileges.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"

	"github.com/usernet/usernet"
)

func main() {
	usernet.AgentMain()
	spacesMain()
	if isCNI(os.Args) {
		os.Exit(runCNI(context.Background()))
	}
	os.Exit(run(context.Background(), os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// Exit statuses of usernet itself. `usernet run` otherwise exits with that of
// its command.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

// run runs usernet with the arguments args, of which the first is its name, and
// returns its exit status.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if len(args) > 0 && filepath.Base(args[0]) == slirpName {
		return runSlirp(ctx, args[0], args[1:], stdout, stderr)
	}
	root := newRoot()
	root.SetArgs(args[1:])
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	initCompletion(root)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	if text := describe(err); text != "" {
		writePatiently(stderr, fmt.Sprintf("usernet: %s\n", text))
	}
	return status(err)
}

// A usageError is a mistake in the arguments.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

func usagef(format string, args ...any) error {
	return &usageError{fmt.Sprintf(format, args...)}
}

// A statusError ends usernet with a certain status, and with a message only if
// there is a cause.
type statusError struct {
	status int
	cause  error
}

func (e *statusError) Error() string {
	if e.cause == nil {
		return ""
	}
	return e.cause.Error()
}

func (e *statusError) Unwrap() error { return e.cause }

func status(err error) int {
	var (
		s *statusError
		u *usageError
	)
	switch {
	case errors.As(err, &s):
		return s.status
	case errors.As(err, &u), errors.Is(err, usernet.ErrConfig), isFlagError(err):
		return exitUsage
	}
	return exitFailure
}

// isFlagError reports whether err is one of pflag's about the command line.
func isFlagError(err error) bool {
	var (
		unknown *pflag.NotExistError
		missing *pflag.ValueRequiredError
		invalid *pflag.InvalidValueError
		syntax  *pflag.InvalidSyntaxError
	)
	return errors.As(err, &unknown) || errors.As(err, &missing) || errors.As(err, &invalid) || errors.As(err, &syntax)
}

// describe puts an error on one line, without the program's name.
func describe(err error) string {
	var (
		unknown *pflag.NotExistError
		missing *pflag.ValueRequiredError
		invalid *pflag.InvalidValueError
	)
	text := err.Error()
	switch {
	case errors.As(err, &unknown):
		text += ": `usernet --help` lists the flags"
	case errors.As(err, &missing):
		text = fmt.Sprintf("set --%s: it needs a value: %s", missing.GetFlag().Name, missing.GetFlag().Usage)
	case errors.As(err, &invalid) && errors.Is(err, usernet.ErrConfig):
		// The package's own words say all of it.
		text = errors.Unwrap(invalid).Error()
	case errors.As(err, &invalid) && invalid.GetFlag().Value.Type() == "bool":
		text = fmt.Sprintf("set --%s %q: choose one of true, false", invalid.GetFlag().Name, invalid.GetValue())
	case errors.As(err, &invalid):
		text = fmt.Sprintf("set --%s %q: %v", invalid.GetFlag().Name, invalid.GetValue(), errors.Unwrap(invalid))
	}
	lines := strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' })
	return strings.TrimPrefix(strings.Join(lines, "; "), "usernet: ")
}
