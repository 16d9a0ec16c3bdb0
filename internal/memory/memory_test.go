package memory

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"testing"
)

// resident is how many KiB of the program's unchangeable pages this process has.
func resident(t *testing.T) int {
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	total, ours := 0, false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := lines.Text()
		if strings.Contains(line, "-") && strings.Contains(line, " r") {
			ours = strings.HasSuffix(line, exe) && !strings.Contains(strings.Fields(line)[1], "w")
		}
		var kib int
		if n, _ := fmt.Sscanf(line, "Rss: %d kB", &kib); n == 1 && ours {
			total += kib
		}
	}
	return total
}

func TestTrim(t *testing.T) {
	before := resident(t)
	Trim()
	after := resident(t)
	if before == 0 || after >= before {
		t.Errorf("%d KiB of the program before, %d after", before, after)
	}
}

func TestRest(t *testing.T) {
	var r rest
	for i, c := range []struct {
		n   uint64
		due bool
	}{
		{0, true}, // it has started
		{0, true},
		{restWork / 2, false},
		{1e6, false},
		{2e6, false},
		{2e6 + restWork, true},
		{2e6 + restWork, true},
		{2e6 + restWork, false},
		{2e6 + restWork, true},
	} {
		if due := r.due(c.n); due != c.due {
			t.Errorf("look %d, at %d: due %v, want %v", i, c.n, due, c.due)
		}
	}
	last := 0
	for look := 5; look < 1000; look++ {
		if r.due(3e6) && look > 5 { // the first has seen work
			last = look
		}
	}
	if last != restLooks+5 {
		t.Errorf("the last time was look %d, want %d", last, restLooks+5)
	}
}
