package usernet

import (
	"os"
	"testing"
	"time"
)

// TestOpenFiles holds that descriptors are counted as /proc does, those of high
// numbers too.
func TestOpenFiles(t *testing.T) {
	const more = 600
	for range more {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
	}
	// What other tests have left may be closed at any time.
	var got, want int
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		got, want = openFiles(), len(entries)-1 // without the directory itself
		if got == want || time.Now().After(deadline) {
			break
		}
	}
	if got != want || got < more {
		t.Errorf("%d files are open, /proc has %d", got, want)
	}
}
