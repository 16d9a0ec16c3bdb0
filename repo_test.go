package usernet_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	module = "github.com/usernet/usernet"
	gvisor = "gvisor.dev/gvisor"
)

// A listed is a package as `go list -json` tells of it.
type listed struct {
	ImportPath string
	Dir        string
	Name       string
	GoFiles    []string
	Imports    []string // not those of tests
}

func listPackages(t *testing.T) []listed {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Dir,Name,GoFiles,Imports", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []listed
	for d := json.NewDecoder(bytes.NewReader(out)); d.More(); {
		var p listed
		if err := d.Decode(&p); err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
	return pkgs
}

// A graph says which packages of the module each one may import. It is a star:
// the rooms do not know each other, and the root joins them. An entry of *
// stands for all that begins so.
type graph map[string][]string

var allowed = graph{
	".":                   {"tap", "stack", "forwarder", "dhcp", "dns", "internal/agent", "internal/capture", "internal/hub", "internal/memory", "internal/netns", "internal/rights", "internal/sandbox", "internal/worker"},
	"tap":                 {"internal/capture", "internal/netns", "internal/vnet"},
	"stack":               {"internal/vnet"},
	"forwarder":           {"internal/congestion", "internal/vnet"},
	"dhcp":                {},
	"dns":                 {},
	"cmd/usernet":         {".", "internal/*"},
	"bench":               {".", "tap", "stack", "forwarder", "dhcp", "dns", "internal/*"},
	"bench/compare":       {".", "tap", "stack", "forwarder", "dhcp", "dns", "bench", "internal/*"},
	"internal/agent":      {"tap", "internal/congestion", "internal/memory", "internal/netns", "internal/rights"},
	"internal/capture":    {},
	"internal/congestion": {},
	"internal/hub":        {"internal/rights"},
	"internal/netns":      {},
	"internal/rights":     {},
	"internal/vnet":       {},
	"internal/control":    {".", "internal/capture"},
	"internal/memory":     {},
	"internal/sandbox":    {},
	"internal/worker":     {"internal/rights"},
	"internal/rig":        {},
	"internal/e2e":        {},
}

// doors are the packages where gVisor's types pass.
var doors = []string{"tap", "stack", "forwarder", "bench", "bench/compare"}

// check lists what pkgs import against the graph and past the doors.
func (g graph) check(pkgs []listed, doors []string) []string {
	var faults []string
	for _, p := range pkgs {
		name := short(p.ImportPath)
		may, known := g[name]
		if !known {
			faults = append(faults, fmt.Sprintf("%s is new: say in repo_test.go what it may import", name))
			continue
		}
		for _, i := range p.Imports {
			switch {
			case i == gvisor || strings.HasPrefix(i, gvisor+"/"):
				if !slices.Contains(doors, name) {
					faults = append(faults, fmt.Sprintf("%s imports %s: gVisor's types stay in %s", name, i, strings.Join(doors, ", ")))
				}
			case i == module || strings.HasPrefix(i, module+"/"):
				if !matches(may, short(i)) {
					faults = append(faults, fmt.Sprintf("%s imports %s: it may import %v", name, short(i), may))
				}
			}
		}
	}
	return faults
}

func short(path string) string {
	if path == module {
		return "."
	}
	return strings.TrimPrefix(path, module+"/")
}

func matches(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		prefix, wild := strings.CutSuffix(p, "*")
		return p == name || wild && strings.HasPrefix(name, prefix)
	})
}

func TestImports(t *testing.T) {
	for _, fault := range allowed.check(listPackages(t), doors) {
		t.Error(fault)
	}
}

// TestImportsGuard breaks every rule of TestImports.
func TestImportsGuard(t *testing.T) {
	g := graph{".": {"dns"}, "dns": {}, "tap": {}, "cmd/usernet": {".", "internal/*"}, "internal/agent": {}}
	pkg := func(name string, imports ...string) []listed {
		path := module
		if name != "." {
			path += "/" + name
		}
		return []listed{{ImportPath: path, Imports: imports}}
	}
	for _, tt := range []struct {
		pkgs   []listed
		faults int
	}{
		{pkg(".", "fmt", module+"/dns"), 0},
		{pkg("cmd/usernet", module, module+"/internal/agent"), 0},
		{pkg("tap", gvisor+"/pkg/tcpip"), 0},
		{pkg("dns", module+"/tap"), 1},
		{pkg("dns", module), 1},
		{pkg("dns", gvisor+"/pkg/tcpip"), 1},
		{pkg(".", module+"/tap", gvisor+"/pkg/tcpip/stack"), 2},
		{pkg("cmd/usernet", module+"/dns"), 1},
		{pkg("internal/agent", module+"/internal"), 1},
		{pkg("unheard-of"), 1},
	} {
		if got := g.check(tt.pkgs, []string{"tap"}); len(got) != tt.faults {
			t.Errorf("%v: %d faults, want %d: %q", tt.pkgs, len(got), tt.faults, got)
		}
	}
}

// TestPackageComments: every package has one comment, and its first paragraph
// is one sentence that begins "Package NAME" or "Command NAME".
func TestPackageComments(t *testing.T) {
	for _, p := range listPackages(t) {
		var comments []string
		for _, file := range p.GoFiles {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil, parser.ParseComments|parser.PackageClauseOnly)
			if err != nil {
				t.Fatal(err)
			}
			if text := packageComment(f); text != "" {
				comments = append(comments, text)
			}
		}
		if fault := checkComments(p.Name, filepath.Base(p.Dir), comments); fault != "" {
			t.Errorf("%s: %s", short(p.ImportPath), fault)
		}
	}
}

func packageComment(f *ast.File) string {
	if f.Doc == nil {
		return ""
	}
	return f.Doc.Text()
}

func checkComments(name, dir string, comments []string) string {
	if len(comments) != 1 {
		return fmt.Sprintf("%d package comments, want one", len(comments))
	}
	start := "Package " + name + " "
	if name == "main" {
		start = "Command " + dir + " "
	}
	paragraph, _, _ := strings.Cut(comments[0], "\n\n")
	paragraph = strings.Join(strings.Fields(paragraph), " ")
	switch {
	case !strings.HasPrefix(paragraph, start):
		return fmt.Sprintf("the package comment begins %.30q, not %q", paragraph, start)
	case !strings.HasSuffix(paragraph, ".") || strings.Contains(paragraph, ". "):
		return fmt.Sprintf("the first paragraph of the package comment is not one sentence: %q", paragraph)
	}
	return ""
}

// TestPackageCommentsGuard breaks every rule of TestPackageComments.
func TestPackageCommentsGuard(t *testing.T) {
	for _, tt := range []struct {
		name, dir string
		comments  []string
		good      bool
	}{
		{"dns", "dns", []string{"Package dns answers\nguests.\n\nMore. And more.\n"}, true},
		{"main", "usernet", []string{"Command usernet runs.\n"}, true},
		{"dns", "dns", nil, false},
		{"dns", "dns", []string{"Package dns a.\n", "Package dns b.\n"}, false},
		{"dns", "dns", []string{"Package dhcp answers guests.\n"}, false},
		{"dns", "dns", []string{"Package dns answers. It caches.\n"}, false},
		{"dns", "dns", []string{"Package dns answers\n"}, false},
		{"main", "usernet", []string{"Package main runs.\n"}, false},
	} {
		if fault := checkComments(tt.name, tt.dir, tt.comments); (fault == "") != tt.good {
			t.Errorf("%q: fault %q", tt.comments, fault)
		}
	}
}

// TestFormat: every file is as gofmt would have it.
func TestFormat(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != "." && strings.HasPrefix(d.Name(), "."):
			return filepath.SkipDir
		case d.IsDir() || filepath.Ext(path) != ".go":
			return nil
		}
		src, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		out, err := format.Source(src)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if !bytes.Equal(src, out) {
			t.Errorf("%s: run gofmt", path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
