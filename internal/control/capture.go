package control

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/usernet/usernet"
)

// captureType is the media type of pcapng.
const captureType = "application/x-pcapng"

// stream is a body that lasts as long as its client reads it.
type stream func(context.Context, io.Writer) error

// serve sends the stream. The server's time for a request is not for it.
func (s stream) serve(w http.ResponseWriter, r *http.Request) {
	c := http.NewResponseController(w)
	_ = c.SetReadDeadline(time.Time{})
	_ = c.SetWriteDeadline(time.Time{})
	if r.Method == http.MethodHead {
		w.Header().Set("Content-Type", captureType)
		return
	}
	defer context.AfterFunc(r.Context(), func() { _ = c.SetWriteDeadline(time.Now().Add(streamEnd)) })()
	sw := &streamWriter{w: w, flush: c.Flush}
	if err := s(r.Context(), sw); err != nil && !sw.begun {
		_ = c.SetWriteDeadline(time.Now().Add(requestTime))
		writeError(w, err)
	}
}

// streamWriter sends at once what is written.
type streamWriter struct {
	w     http.ResponseWriter
	flush func() error
	begun bool
}

func (s *streamWriter) Write(b []byte) (int, error) {
	if !s.begun {
		s.begun = true
		h := s.w.Header()
		h.Set("Content-Type", captureType)
		h.Set("Cache-Control", "no-store")
	}
	n, err := s.w.Write(b)
	if err == nil {
		err = s.flush()
	}
	return n, err
}

func (s *Server) getCapture(r *request) (int, any, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return 0, nil, badRequest("the query is malformed: %v", err)
	}
	for name, values := range q {
		if !slices.Contains([]string{"filter", "snaplen"}, name) || len(values) > 1 {
			return 0, nil, badRequest("query %q: there are filter and snaplen, once each", name)
		}
	}
	o := usernet.CaptureOptions{Filter: q.Get("filter")}
	if text := q.Get("snaplen"); text != "" {
		if o.Snaplen, err = strconv.Atoi(text); err != nil {
			return 0, nil, badRequest("snaplen %q: it is not a number", text)
		}
	}
	r.working()
	return http.StatusOK, stream(func(ctx context.Context, w io.Writer) error {
		return s.cfg.Network.Capture(ctx, w, o)
	}), nil
}
