package rig

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// binaryVariable names a ready-made binary to test, buildVariable flags for
// building one: USERNET_RIG_BUILD=-race finds races in the product.
const (
	binaryVariable = "USERNET_RIG_BINARY"
	buildVariable  = "USERNET_RIG_BUILD"
)

// buildDir is what runTests removes.
var buildDir string

// Binary builds the command once per run of the tests. Everybody may execute
// the result.
func Binary(t testing.TB) string {
	t.Helper()
	path, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var build = sync.OnceValues(func() (string, error) {
	if path := os.Getenv(binaryVariable); path != "" {
		return path, nil
	}
	if err := touchSources(); err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "usernet-build-")
	if err != nil {
		return "", err
	}
	buildDir = dir
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	path := filepath.Join(dir, "usernet")
	flags := strings.Fields(os.Getenv(buildVariable))
	cgo := "CGO_ENABLED=0"
	if strings.Contains(os.Getenv(buildVariable), "-race") {
		cgo = "CGO_ENABLED=1" // the race detector's run time needs it
	}
	args := append([]string{"build", "-o", path}, flags...)
	cmd := exec.Command("go", append(args, "github.com/usernet/usernet/cmd/usernet")...)
	cmd.Env = append(os.Environ(), cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("rig: build the command: %w\n%s", err, out)
	}
	return path, nil
})

// touchSources looks at every source file of the module. That makes them inputs
// of the test as go test sees it, which else would give a cached result for a
// command that has changed: it is not linked into the test.
func touchSources() error {
	root, err := os.Getwd()
	for err == nil {
		if _, missing := os.Stat(filepath.Join(root, "go.mod")); missing == nil {
			break
		}
		if root == "/" {
			return fmt.Errorf("rig: find the module: no go.mod above the tests")
		}
		root = filepath.Dir(root)
	}
	if err != nil {
		return err
	}
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
		case d.IsDir() && path != root && strings.HasPrefix(d.Name(), "."):
			return filepath.SkipDir
		case strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go"):
			_, err = os.Stat(path)
		}
		if os.IsNotExist(err) {
			return nil // an editor's file that has gone again
		}
		return err
	})
}

// runTests runs the tests and removes what Binary has built.
func runTests(m *testing.M) int {
	code := m.Run()
	if buildDir != "" {
		os.RemoveAll(buildDir)
	}
	return code
}
