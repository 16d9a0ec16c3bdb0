package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/usernet/usernet"
)

// A Client asks the network whose socket is at Path.
type Client struct {
	Path string
	http *http.Client
}

// clientTime is how long an answer may take.
const clientTime = 15 * time.Second

// NewClient returns a client of the socket at path. It connects to nothing yet.
func NewClient(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
	return &Client{path, &http.Client{Timeout: clientTime, Transport: &http.Transport{DialContext: dial, DisableCompression: true}}}
}

// Live lists the sockets in the default directory, and in that of the CNI plugin
// below it, that somebody listens on.
func Live() []string {
	dir := DefaultDir()
	if dir == "" {
		return nil
	}
	paths, _ := filepath.Glob(filepath.Join(dir, "*.sock"))
	plugin, _ := filepath.Glob(filepath.Join(dir, "cni", "*.sock"))
	paths = append(paths, plugin...)
	return slices.DeleteFunc(paths, func(path string) bool {
		c, err := net.DialTimeout("unix", path, time.Second)
		if err != nil {
			// Where many wait already somebody listens.
			return !errors.Is(err, syscall.EAGAIN) && !errors.Is(err, os.ErrDeadlineExceeded)
		}
		c.Close()
		return false
	})
}

// An Error is what a network answered instead of doing it.
type Error struct {
	Status        int
	Code, Message string
}

func (e *Error) Error() string { return strings.TrimPrefix(e.Message, "usernet: ") }

// Call does a request and returns the body of the answer.
func (c *Client) Call(ctx context.Context, method, path string, body any) ([]byte, error) {
	var r io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("control: %w", err)
		}
		r = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://usernet"+path, r)
	if err != nil {
		return nil, fmt.Errorf("control: %w", err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, c.explain(err)
	}
	if resp.StatusCode < 300 {
		return b, nil
	}
	return nil, c.refusal(resp, b)
}

// refusal is the error that an answer is.
func (c *Client) refusal(resp *http.Response, body []byte) error {
	var e errorBody
	if json.Unmarshal(body, &e) != nil || e.Error.Message == "" {
		return fmt.Errorf("control: ask %s: it answered %s", c.Path, resp.Status)
	}
	return &Error{resp.StatusCode, e.Error.Code, e.Error.Message}
}

// explain says what an error of the connection means.
func (c *Client) explain(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("ask %s: there is no such socket: is that usernet running?", c.Path)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("ask %s: nobody listens there any more", c.Path)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("ask %s: it is another user's: be that user, or root", c.Path)
	}
	return fmt.Errorf("ask %s: %w", c.Path, err)
}

// get decodes the answer to a GET.
func get[T any](ctx context.Context, c *Client, path string) (T, error) {
	var to T
	b, err := c.Call(ctx, http.MethodGet, path, nil)
	if err == nil {
		err = json.Unmarshal(b, &to)
	}
	return to, err
}

// Flows lists the flows.
func (c *Client) Flows(ctx context.Context) ([]usernet.Flow, error) {
	l, err := get[flowList](ctx, c, "/v1/flows")
	return l.Flows, err
}

// KillFlow ends a flow.
func (c *Client) KillFlow(ctx context.Context, id string) error {
	_, err := c.Call(ctx, http.MethodDelete, "/v1/flows/"+url.PathEscape(id), nil)
	return err
}

// Forwards lists the published ports.
func (c *Client) Forwards(ctx context.Context) ([]Forward, error) {
	l, err := get[forwardList](ctx, c, "/v1/forwards")
	return l.Forwards, err
}

// AddForward publishes the ports of a specification as on the command line.
func (c *Client) AddForward(ctx context.Context, spec string) ([]Forward, error) {
	b, err := c.Call(ctx, http.MethodPost, "/v1/forwards", map[string]string{"spec": spec})
	var l forwardList
	if err == nil {
		err = json.Unmarshal(b, &l)
	}
	return l.Forwards, err
}

// RemoveForward ends a forward.
func (c *Client) RemoveForward(ctx context.Context, id string) error {
	_, err := c.Call(ctx, http.MethodDelete, "/v1/forwards/"+url.PathEscape(id), nil)
	return err
}

// Capture starts a capture. What is read is pcapng, until ctx is done or the
// network ends.
func (c *Client) Capture(ctx context.Context, o usernet.CaptureOptions) (io.ReadCloser, error) {
	q := url.Values{}
	if o.Filter != "" {
		q.Set("filter", o.Filter)
	}
	if o.Snaplen != 0 {
		q.Set("snaplen", strconv.Itoa(o.Snaplen))
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://usernet/v1/capture?"+q.Encode(), nil)
	if err != nil {
		return nil, fmt.Errorf("control: %w", err)
	}
	patient := &http.Client{Transport: c.http.Transport}
	resp, err := patient.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return nil, c.explain(err)
	}
	return nil, c.refusal(resp, b)
}

// Leases lists the guest's leases.
func (c *Client) Leases(ctx context.Context) ([]usernet.Lease, error) {
	l, err := get[leaseList](ctx, c, "/v1/leases")
	return l.Leases, err
}

// Records lists the local names.
func (c *Client) Records(ctx context.Context) ([]usernet.Record, error) {
	l, err := get[recordList](ctx, c, "/v1/dns")
	return l.Records, err
}

// SetRecord gives a name its addresses.
func (c *Client) SetRecord(ctx context.Context, name string, addrs []netip.Addr) error {
	_, err := c.Call(ctx, http.MethodPut, "/v1/dns/"+url.PathEscape(name), addressList{addrs})
	return err
}

// AddRecord gives a name addresses beside those it has.
func (c *Client) AddRecord(ctx context.Context, name string, addrs []netip.Addr) error {
	_, err := c.Call(ctx, http.MethodPost, "/v1/dns/"+url.PathEscape(name), addressList{addrs})
	return err
}

// RemoveRecord takes a name away.
func (c *Client) RemoveRecord(ctx context.Context, name string) error {
	_, err := c.Call(ctx, http.MethodDelete, "/v1/dns/"+url.PathEscape(name), nil)
	return err
}

// Info tells what the network is.
func (c *Client) Info(ctx context.Context) (Info, error) { return get[Info](ctx, c, "/v1/info") }

// Level returns the log level, SetLevel sets it.
func (c *Client) Level(ctx context.Context) (string, error) {
	l, err := get[levelBody](ctx, c, "/v1/log-level")
	return l.Level, err
}

// SetLevel sets the log level.
func (c *Client) SetLevel(ctx context.Context, level string) error {
	_, err := c.Call(ctx, http.MethodPut, "/v1/log-level", levelBody{level})
	return err
}
