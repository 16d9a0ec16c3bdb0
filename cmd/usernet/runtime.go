package main

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/usernet/usernet/internal/memory"
)

// tuneRuntime prepares this process for looking after the one that carries
// traffic: it has little to do, and its memory adds to that. What the environment
// says about the Go runtime goes before.
func tuneRuntime(ctx context.Context, ready <-chan struct{}) {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
	if os.Getenv("GOGC") == "" {
		const percent = 25
		debug.SetGCPercent(percent)
	}
	go func() {
		select {
		case <-ready:
		case <-ctx.Done():
			return
		}
		const settled = 200 * time.Millisecond // whoever waited goes first
		select {
		case <-time.After(settled):
			memory.Trim()
		case <-ctx.Done():
		}
	}()
}
