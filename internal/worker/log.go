package worker

import (
	"context"
	"encoding"
	"fmt"
	"log/slog"
	"strconv"
	"sync/atomic"
	"time"
)

// A Record is a log record on its way.
type Record struct {
	Time  time.Time  `json:"t"`
	Level slog.Level `json:"l"`
	Text  string     `json:"m"`
	Attrs []Attr     `json:"a,omitempty"`
}

// An Attr is an attribute of a record. What is neither a number, a truth value
// nor a duration goes as the text that it would be written as.
type Attr struct {
	Key   string `json:"k"`
	Kind  string `json:"t,omitempty"` // i, u, f, b, d; "" for text
	Value string `json:"v"`
}

// Slog returns the record for a handler.
func (r Record) Slog() slog.Record {
	out := slog.NewRecord(r.Time, r.Level, r.Text, 0)
	for _, a := range r.Attrs {
		out.AddAttrs(a.slog())
	}
	return out
}

func (a Attr) slog() slog.Attr {
	switch a.Kind {
	case "i":
		if n, err := strconv.ParseInt(a.Value, 10, 64); err == nil {
			return slog.Int64(a.Key, n)
		}
	case "u":
		if n, err := strconv.ParseUint(a.Value, 10, 64); err == nil {
			return slog.Uint64(a.Key, n)
		}
	case "f":
		if f, err := strconv.ParseFloat(a.Value, 64); err == nil {
			return slog.Float64(a.Key, f)
		}
	case "b":
		return slog.Bool(a.Key, a.Value == "true")
	case "d":
		if n, err := strconv.ParseInt(a.Value, 10, 64); err == nil {
			return slog.Duration(a.Key, time.Duration(n))
		}
	}
	return slog.String(a.Key, a.Value)
}

// logQueue is how many records wait to be sent. Traffic does not wait for them:
// what finds no room is lost, and counted.
const logQueue = 256

// A LogHandler sends records to the other side.
type LogHandler struct {
	*sender
	attrs  []Attr
	prefix string
}

type sender struct {
	level slog.LevelVar
	queue chan Record
	lost  atomic.Uint64
}

// NewLogHandler returns a handler that sends nothing before Send is called.
func NewLogHandler() *LogHandler {
	return &LogHandler{sender: &sender{queue: make(chan Record, logQueue)}}
}

// SetLevel sets what is worth sending.
func (h *LogHandler) SetLevel(l slog.Level) { h.level.Set(l) }

// Send sends records until the connection ends.
func (h *LogHandler) Send(c *Conn, op string) {
	for r := range h.queue {
		if n := h.lost.Swap(0); n > 0 {
			_ = c.Note(op, Record{Time: time.Now(), Level: slog.LevelWarn, Text: "log records are lost: there are too many",
				Attrs: []Attr{{"lost", "u", strconv.FormatUint(n, 10)}}})
		}
		if c.Note(op, r) == ErrEnded {
			return
		}
	}
}

// Enabled implements slog.Handler.
func (h *LogHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level.Level() }

// Handle implements slog.Handler.
func (h *LogHandler) Handle(_ context.Context, r slog.Record) error {
	out := Record{Time: r.Time.Round(0), Level: r.Level, Text: r.Message, Attrs: h.attrs[:len(h.attrs):len(h.attrs)]}
	r.Attrs(func(a slog.Attr) bool {
		out.Attrs = appendAttr(out.Attrs, h.prefix, a)
		return true
	})
	select {
	case h.queue <- out:
	default:
		h.lost.Add(1)
	}
	return nil
}

// WithAttrs implements slog.Handler.
func (h *LogHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	out := &LogHandler{h.sender, h.attrs[:len(h.attrs):len(h.attrs)], h.prefix}
	for _, a := range attrs {
		out.attrs = appendAttr(out.attrs, h.prefix, a)
	}
	return out
}

// WithGroup implements slog.Handler.
func (h *LogHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	return &LogHandler{h.sender, h.attrs, h.prefix + name + "."}
}

func appendAttr(to []Attr, prefix string, a slog.Attr) []Attr {
	v := a.Value.Resolve()
	out := Attr{Key: prefix + a.Key}
	switch v.Kind() {
	case slog.KindInt64:
		out.Kind, out.Value = "i", strconv.FormatInt(v.Int64(), 10)
	case slog.KindUint64:
		out.Kind, out.Value = "u", strconv.FormatUint(v.Uint64(), 10)
	case slog.KindFloat64:
		out.Kind, out.Value = "f", strconv.FormatFloat(v.Float64(), 'g', -1, 64)
	case slog.KindBool:
		out.Kind, out.Value = "b", strconv.FormatBool(v.Bool())
	case slog.KindDuration:
		out.Kind, out.Value = "d", strconv.FormatInt(int64(v.Duration()), 10)
	case slog.KindGroup:
		inner := prefix
		if a.Key != "" {
			inner += a.Key + "."
		}
		for _, b := range v.Group() {
			to = appendAttr(to, inner, b)
		}
		return to
	case slog.KindAny:
		out.Value = textOf(v.Any())
	default:
		out.Value = v.String()
	}
	return append(to, out)
}

// textOf writes a value as slog's text handler does.
func textOf(v any) string {
	if m, ok := v.(encoding.TextMarshaler); ok {
		if b, err := m.MarshalText(); err == nil {
			return string(b)
		}
	}
	return fmt.Sprintf("%+v", v)
}
