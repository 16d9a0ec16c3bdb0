package main

import (
	"io"
	"strings"
	"testing"
)

// TestLogWaitsForNobody: what a stuck reader has no room for is lost, and counted
// when it reads again.
func TestLogWaitsForNobody(t *testing.T) {
	r, w := io.Pipe()
	f := networkFlags{level: "info", format: "text"}
	log, flush := f.logger(w)
	const more = 100
	for range logRoom + 1 + more { // one is being written
		log.Info("a record")
	}
	read := make(chan string)
	go func() {
		b, _ := io.ReadAll(r)
		read <- string(b)
	}()
	flush()
	w.Close()
	text := <-read
	if n := strings.Count(text, "a record"); n < logRoom || n >= logRoom+more {
		t.Errorf("%d records were kept, want about %d", n, logRoom)
	}
	if !strings.Contains(text, "log records are lost") || !strings.Contains(text, "lost=") {
		t.Errorf("not a word about those that were lost:\n%.500s", text)
	}
}
