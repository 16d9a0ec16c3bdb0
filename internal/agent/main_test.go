package agent

import (
	"fmt"
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	Main()
	// A process with the race detector sleeps for a second before it exits.
	os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	if role := os.Getenv(roleEnv); role != "" {
		if err := helper(role); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := m.Run()
	removeBinary()
	os.Exit(code)
}
