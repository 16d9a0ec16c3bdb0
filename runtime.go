package usernet

import (
	"os"
	"runtime/debug"
)

// The engine is one goroutine, and netstack's work is done between its turns.
// With a second thread the two wake each other for every segment: measured on
// two cores, one thread carries more and answers sooner. The worker starts with
// GOMAXPROCS=1 for that, unless its environment says otherwise.

// The heap of a network at rest is a few megabytes, and a bulk transfer would
// have it collected a hundred times a second. The ballast is never touched, so
// it takes no memory; the collector counts it all the same and lets garbage grow
// to a quarter of it, whatever else lives.
const (
	ballastSize = 32 << 20
	gcPercent   = 25
)

//lint:ignore U1000 being referenced is its use
var ballast []byte

// tuneWorker prepares this process for carrying traffic. What the environment
// says about the Go runtime goes before.
func tuneWorker() {
	if os.Getenv("GOGC") == "" {
		ballast = make([]byte, ballastSize)
		debug.SetGCPercent(gcPercent)
	}
}
