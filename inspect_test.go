package usernet

import (
	"os"
	"testing"
)

// TestOpenFiles: descriptors are counted, those of high numbers too.
func TestOpenFiles(t *testing.T) {
	before := openFiles()
	if before < 3 {
		t.Errorf("%d files are open, with the standard streams", before)
	}
	const more = 600
	for range more {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
	}
	if got := openFiles(); got != before+more {
		t.Errorf("%d files are open after %d more than %d", got, more, before)
	}
}
