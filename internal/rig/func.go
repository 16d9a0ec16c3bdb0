package rig

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"
)

// functions are what nodes can be asked to run. The test and its nodes are the
// same binary, so they agree on the table.
var functions = map[string]func(context.Context, json.RawMessage) (any, error){}

// A Func is a Go function that a test can call in a node.
type Func[In, Out any] struct {
	name    string
	timeout time.Duration
}

// NewFunc registers f. It is for package-level variables: every process must
// have registered the same functions before Main runs.
//
// f must end when its context does. What it leaves running (a server, say)
// ends with the node.
func NewFunc[In, Out any](name string, f func(context.Context, In) (Out, error)) Func[In, Out] {
	if functions[name] != nil {
		panic("rig: two functions of the name " + name)
	}
	functions[name] = func(ctx context.Context, raw json.RawMessage) (any, error) {
		var in In
		if err := json.Unmarshal(raw, &in); err != nil {
			return nil, fmt.Errorf("rig: decode argument of %s: %w", name, err)
		}
		return f(ctx, in)
	}
	return Func[In, Out]{name: name, timeout: Patience}
}

// Within gives f another deadline than a minute.
func (f Func[In, Out]) Within(d time.Duration) Func[In, Out] {
	f.timeout = d
	return f
}

// On calls f in node n and ends the test if it fails.
func (f Func[In, Out]) On(t testing.TB, n *Node, in In) Out {
	t.Helper()
	out, err := f.Try(n, in)
	if err != nil {
		t.Fatalf("%s in %s: %v", f.name, n.Name, err)
	}
	return out
}

// Try calls f in node n. An error of f's is an *Error.
func (f Func[In, Out]) Try(n *Node, in In) (Out, error) {
	out, files, err := f.TryFiles(n, in)
	closeFiles(files)
	return out, err
}

// TryFiles is Try for a function that also hands over files (see SendFile).
func (f Func[In, Out]) TryFiles(n *Node, in In) (Out, []*os.File, error) {
	var out Out
	raw, err := json.Marshal(in)
	if err != nil {
		return out, nil, fmt.Errorf("rig: encode argument of %s: %w", f.name, err)
	}
	result, files, err := n.call(f.name, raw, f.timeout)
	if err != nil {
		return out, files, err
	}
	return out, files, json.Unmarshal(result, &out)
}

// fileSink collects what a running function hands over.
type fileSink struct {
	mu    sync.Mutex
	files []*os.File
}

type fileSinkKey struct{}

// SendFile hands f to the test along with the result. It is for a running Func.
func SendFile(ctx context.Context, f *os.File) {
	sink := ctx.Value(fileSinkKey{}).(*fileSink)
	sink.mu.Lock()
	defer sink.mu.Unlock()
	sink.files = append(sink.files, f)
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
