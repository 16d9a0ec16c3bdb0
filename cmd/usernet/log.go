package main

import (
	"bytes"
	"io"
	"log/slog"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// logRoom is how many records wait for whoever reads the log. What finds no
	// room is lost, and counted.
	logRoom = 1024
	// logPatience is how long a record is waited for, unless one before was in vain.
	logPatience = time.Second
	// lastWordsTime is how long the end waits for the log to be read.
	lastWordsTime = time.Second
)

// logger returns the logger that the flags ask for, and what waits until all is
// written. Nothing waits long for whoever reads the log, and it may go away.
func (f *networkFlags) logger(w io.Writer) (log *slog.Logger, flush func()) {
	_ = f.levelVar.UnmarshalText([]byte(f.level)) // one of the words that the flag takes
	o := &slog.HandlerOptions{Level: &f.levelVar}
	to := func(w io.Writer) *slog.Logger {
		if f.format == "json" {
			return slog.New(slog.NewJSONHandler(w, o))
		}
		return slog.New(slog.NewTextHandler(w, o))
	}
	// A pipe without a reader would end this process with the next line. (To
	// ignore the signal would have `usernet run` hand that down to its command.)
	notify(make(chan os.Signal, 1), []syscall.Signal{unix.SIGPIPE})
	q := &logWriter{to: w, own: to(w), lines: make(chan logLine, logRoom), ended: make(chan struct{})}
	go q.run()
	return to(q), q.flush
}

// A logWriter hands lines to a writer that may be stuck. Otherwise they are written
// when Write returns.
type logWriter struct {
	to    io.Writer
	own   *slog.Logger // writes to it, too
	lines chan logLine
	stuck atomic.Bool // nobody is to wait
	lost  atomic.Uint64
	ended chan struct{}
}

type logLine struct {
	text    []byte // nil is the end
	written chan struct{}
}

// Write implements io.Writer.
func (w *logWriter) Write(text []byte) (int, error) {
	line := logLine{bytes.Clone(text), make(chan struct{})}
	select {
	case w.lines <- line:
	default:
		w.lost.Add(1)
		return len(text), nil
	}
	if !w.stuck.Load() {
		select {
		case <-line.written:
		case <-time.After(logPatience):
			w.stuck.Store(true)
		}
	}
	return len(text), nil
}

func (w *logWriter) run() {
	defer close(w.ended)
	for line := range w.lines {
		if n := w.lost.Swap(0); n > 0 {
			w.own.Warn("log records are lost: they are not read as fast as they come", "lost", n)
		}
		if line.text == nil {
			return
		}
		_, _ = w.to.Write(line.text) // on a full disk, the next one may be luckier
		close(line.written)
		if len(w.lines) == 0 {
			w.stuck.Store(false)
		}
	}
}

// flush waits until all lines are written, as long as that is worth it. Those that
// come later are lost.
func (w *logWriter) flush() {
	late := time.After(lastWordsTime)
	select {
	case w.lines <- logLine{}:
	case <-late:
		return
	}
	select {
	case <-w.ended:
	case <-late:
	}
}

// writePatiently writes the last words of this process, which shall not keep it.
func writePatiently(w io.Writer, text string) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.WriteString(w, text)
	}()
	select {
	case <-done:
	case <-time.After(lastWordsTime):
	}
}
