package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/usernet/usernet"
)

// apiError is an error with what a program needs to act on it.
type apiError struct {
	status int
	code   string
	text   string
}

func (e *apiError) Error() string { return e.text }

func badRequest(format string, args ...any) error {
	return &apiError{http.StatusBadRequest, "bad-request", fmt.Sprintf(format, args...)}
}

var errNoLevel = &apiError{http.StatusNotImplemented, "not-implemented", "the log level of this process is not to be changed"}

// classify finds the status and code of an error.
func classify(err error) *apiError {
	var (
		own  *apiError
		size *http.MaxBytesError
	)
	if errors.As(err, &own) {
		return own
	}
	if errors.As(err, &size) {
		return &apiError{http.StatusRequestEntityTooLarge, "too-large", fmt.Sprintf("a body has at most %d bytes", size.Limit)}
	}
	for _, c := range []struct {
		is     error
		status int
		code   string
	}{
		{usernet.ErrConfig, http.StatusBadRequest, "bad-request"},
		{usernet.ErrNoFlow, http.StatusNotFound, "not-found"},
		{usernet.ErrNoForward, http.StatusNotFound, "not-found"},
		{usernet.ErrNoRecord, http.StatusNotFound, "not-found"},
		{usernet.ErrNoDNS, http.StatusConflict, "no-dns"},
		{usernet.ErrCaptures, http.StatusServiceUnavailable, "busy"},
		{syscall.EADDRINUSE, http.StatusConflict, "address-in-use"},
		{syscall.EADDRNOTAVAIL, http.StatusBadRequest, "address-not-available"},
		{syscall.EACCES, http.StatusForbidden, "not-permitted"},
		{syscall.EPERM, http.StatusForbidden, "not-permitted"},
		{usernet.ErrNotRunning, http.StatusServiceUnavailable, "not-running"},
		{context.DeadlineExceeded, http.StatusServiceUnavailable, "busy"},
		{errors.ErrUnsupported, http.StatusNotImplemented, "not-implemented"},
	} {
		if errors.Is(err, c.is) {
			return &apiError{c.status, c.code, err.Error()}
		}
	}
	return &apiError{http.StatusInternalServerError, "internal", err.Error()}
}

// errorBody is the body of every error.
type errorBody struct {
	Error struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	} `json:"error"`
}

func writeError(w http.ResponseWriter, err error) {
	e := classify(err)
	var b errorBody
	b.Error.Code, b.Error.Message = e.code, e.text
	writeBody(w, e.status, b)
}

// writeBody writes an answer. The only thing that can fail is the client.
func writeBody(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Cache-Control", "no-store")
	switch body := body.(type) {
	case nil:
		w.WriteHeader(status)
	case metrics:
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		w.WriteHeader(status)
		body.write(w)
	case flowList:
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		writeFlows(w, body.Flows)
	default:
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(body)
	}
}

// flowsPerTurn is how many flows are written before traffic gets its turn: they
// may be many, and there may be one processor.
const flowsPerTurn = 64

func writeFlows(w io.Writer, flows []usernet.Flow) {
	b := bufio.NewWriter(w)
	b.WriteString(`{"flows":[`)
	for i := range flows {
		if i > 0 {
			b.WriteByte(',')
		}
		text, err := json.Marshal(&flows[i])
		if err != nil {
			return
		}
		if _, err := b.Write(text); err != nil {
			return
		}
		if i%flowsPerTurn == flowsPerTurn-1 {
			runtime.Gosched()
		}
	}
	b.WriteString("]}\n")
	b.Flush()
}

// decode reads the body, which is one JSON object with no member that to does
// not have, and none twice.
func (r *request) decode(to any) error {
	b, err := io.ReadAll(http.MaxBytesReader(r.w, r.Body, maxBody))
	if err != nil {
		var size *http.MaxBytesError
		if errors.As(err, &size) {
			return err
		}
		return badRequest("the body did not arrive: %v", err)
	}
	r.working()
	if !utf8.Valid(b) {
		return badRequest("the body is not UTF-8")
	}
	if err := checkObject(b); err != nil {
		return badRequest("the body is not one JSON object: %v", err)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(to); err != nil {
		return badRequest("the body is not what is wanted here: %v", err)
	}
	return nil
}

// maxDepth is how deep a body may be nested; none needs more than two.
const maxDepth = 8

// checkObject finds what encoding/json lets pass: members that are there twice,
// of which two readers may take different ones, and what follows the object.
func checkObject(b []byte) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	t, err := d.Token()
	if err != nil {
		return noEOF(err)
	}
	if t != json.Delim('{') {
		return errors.New("it begins otherwise")
	}
	if err := checkMembers(d, 1); err != nil {
		return noEOF(err)
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("more follows it")
	}
	return nil
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// checkMembers reads to the end of an object or array that has begun.
func checkMembers(d *json.Decoder, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("it is nested more than %d deep", maxDepth)
	}
	seen := make(map[string]bool)
	for isName := true; ; isName = !isName {
		t, err := d.Token()
		if err != nil {
			return err
		}
		switch t := t.(type) {
		case json.Delim:
			if t == '}' || t == ']' {
				return nil
			}
			inner := checkMembers
			if t == '[' {
				inner = checkItems
			}
			if err := inner(d, depth+1); err != nil {
				return err
			}
		case string:
			if name := strings.ToLower(t); isName && seen[name] {
				return fmt.Errorf("it has %s twice", strconv.Quote(t))
			}
			if isName {
				seen[strings.ToLower(t)] = true // encoding/json does not care for letter case
			}
		}
	}
}

func checkItems(d *json.Decoder, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("it is nested more than %d deep", maxDepth)
	}
	for {
		t, err := d.Token()
		if err != nil {
			return err
		}
		delim, ok := t.(json.Delim)
		switch {
		case !ok:
		case delim == ']':
			return nil
		case delim == '{':
			err = checkMembers(d, depth+1)
		default:
			err = checkItems(d, depth+1)
		}
		if err != nil {
			return err
		}
	}
}
