package stack

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"gvisor.dev/gvisor/pkg/log"
)

// netstackLog takes what netstack would write to stderr, in a format of its own
// and as often as a guest makes it.
type netstackLog struct{ to *slog.Logger }

// Emit implements log.Emitter. Whatever netstack finds worth a warning, a guest
// has done to itself.
func (l netstackLog) Emit(_ int, _ log.Level, _ time.Time, format string, args ...any) {
	if l.to.Enabled(context.Background(), slog.LevelDebug) {
		l.to.Debug("netstack", "text", fmt.Sprintf(format, args...))
	}
}
