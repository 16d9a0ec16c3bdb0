package control

import (
	"encoding/json"
	"log/slog"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// FuzzRequest: every request is answered, with JSON that says what is wrong
// where something is, and never as a fault of ours.
func FuzzRequest(f *testing.F) {
	for _, r := range [][3]string{
		{"GET", "/v1/info", ""}, {"GET", "/v1/flows", ""}, {"GET", "/metrics", ""}, {"GET", "/v1/capture?filter=tcp", ""}, {"HEAD", "/v1/stats", ""}, {"DELETE", "/v1/flows/1", ""},
		{"POST", "/v1/forwards", `{"spec":"127.0.0.1:8080:80"}`}, {"POST", "/v1/forwards", `{"protocol":"tcp","host":":1","guest":":1"}`},
		{"POST", "/v1/forwards", `{"spec":"8080-8089:80-89/udp"}`}, {"POST", "/v1/forwards", `{"spec":"unix:/x:80"}`},
		{"PUT", "/v1/dns/a.test", `{"addresses":["192.0.2.1","2001:db8::1"]}`}, {"PUT", "/v1/log-level", `{"level":"debug"}`},
		{"POST", "/v1/forwards", `{"a":{"a":[{}]},"A":1}`},
	} {
		f.Add(r[0], r[1], []byte(r[2]))
	}
	f.Fuzz(func(t *testing.T, method, path string, body []byte) {
		u, err := url.ParseRequestURI(path)
		if err != nil || !strings.HasPrefix(path, "/") || strings.ContainsAny(method, " \t\r\n") || method == "" {
			return
		}
		s := New(Config{Network: newState(), Version: "test", Level: new(slog.LevelVar)})
		r := httptest.NewRequest("GET", "/", strings.NewReader(string(body)))
		r.Method, r.URL = method, u
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		switch {
		case w.Code >= 500 && w.Code != 501:
			t.Errorf("%s %s %q: status %d: %s", method, path, body, w.Code, w.Body)
		case w.Code >= 400:
			var e errorBody
			if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil || e.Error.Code == "" || e.Error.Message == "" {
				t.Errorf("%s %s %q: status %d without a reason: %s", method, path, body, w.Code, w.Body)
			}
		}
	})
}
