package control

import (
	"encoding/json"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// yaml reads as much of YAML as docs/openapi.yaml has: nested maps, lists of
// flow maps, flow maps and lists, and texts in block style.
type yaml struct {
	t     *testing.T
	lines []string
}

func readYAML(t *testing.T, path string) map[string]any {
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	y := &yaml{t, strings.Split(strings.TrimRight(string(b), "\n"), "\n")}
	return y.block(0).(map[string]any)
}

func indent(line string) int { return len(line) - len(strings.TrimLeft(line, " ")) }

func (y *yaml) block(depth int) any {
	m := make(map[string]any)
	var list []any
	for len(y.lines) > 0 && indent(y.lines[0]) == depth {
		line := strings.TrimSpace(y.lines[0])
		y.lines = y.lines[1:]
		if item, ok := strings.CutPrefix(line, "- "); ok {
			list = append(list, y.scalar(item))
			continue
		}
		key, value, ok := strings.Cut(line, ":")
		if !ok {
			y.t.Fatalf("not understood: %q", line)
		}
		key = strings.Trim(key, "'")
		if _, twice := m[key]; twice {
			y.t.Fatalf("%s is there twice", key)
		}
		switch value = strings.TrimSpace(value); {
		case value == "|":
			for len(y.lines) > 0 && indent(y.lines[0]) > depth {
				y.lines = y.lines[1:]
			}
		case value != "":
			m[key] = y.scalar(value)
		case len(y.lines) > 0 && indent(y.lines[0]) > depth:
			m[key] = y.block(indent(y.lines[0]))
		}
	}
	if list != nil {
		return list
	}
	return m
}

func (y *yaml) scalar(s string) any {
	if len(s) > 0 && (s[0] == '{' || s[0] == '[') {
		v, rest := y.flow(s)
		if rest != "" {
			y.t.Fatalf("%q follows in %q", rest, s)
		}
		return v
	}
	return strings.Trim(s, "'")
}

// flow reads {a: b, …} or [a, …].
func (y *yaml) flow(s string) (any, string) {
	m, list, end := make(map[string]any), []any{}, byte('}')
	isMap := s[0] == '{'
	if !isMap {
		end = ']'
	}
	s = s[1:]
	for s != "" && s[0] != end {
		key := ""
		if isMap {
			key, s, _ = strings.Cut(s, ":")
			s = strings.TrimSpace(s)
		}
		var v any
		switch s[0] {
		case '{', '[':
			v, s = y.flow(s)
		case '\'':
			text, rest, _ := strings.Cut(s[1:], "'")
			v, s = text, rest
		default:
			i := strings.IndexAny(s, ",]}")
			v, s = s[:i], s[i:]
		}
		if isMap {
			m[strings.TrimSpace(key)] = v
		} else {
			list = append(list, v)
		}
		s = strings.TrimLeft(s, ", ")
	}
	if s == "" {
		y.t.Fatal("a flow collection has no end")
	}
	if isMap {
		return m, s[1:]
	}
	return list, s[1:]
}

// A spec is the OpenAPI document.
type spec struct {
	t   *testing.T
	doc map[string]any
}

// at follows a path of names, and references.
func (s *spec) at(v any, path ...string) any {
	for {
		m, ok := v.(map[string]any)
		if ok {
			if ref, is := m["$ref"].(string); is {
				v = s.at(s.doc, strings.Split(strings.TrimPrefix(ref, "#/"), "/")...)
				if v == nil {
					s.t.Fatalf("%s leads nowhere", ref)
				}
				continue
			}
		}
		if len(path) == 0 {
			return v
		}
		if !ok {
			return nil
		}
		v, path = m[path[0]], path[1:]
	}
}

// check holds a value to a schema: types, no member that is not in it, and all
// that are required.
func (s *spec) check(where string, v, schema any) {
	m, ok := s.at(schema).(map[string]any)
	if !ok {
		s.t.Errorf("%s: there is no schema", where)
		return
	}
	good := true
	switch v := v.(type) {
	case map[string]any:
		good = m["type"] == "object"
		props, _ := m["properties"].(map[string]any)
		for name, value := range v {
			p, ok := props[name]
			if !ok {
				p, ok = m["additionalProperties"]
			}
			if !ok {
				s.t.Errorf("%s has a member %s that the schema has not", where, name)
				continue
			}
			s.check(where+"."+name, value, p)
		}
		required, _ := m["required"].([]any)
		for _, r := range required {
			if _, ok := v[r.(string)]; !ok {
				s.t.Errorf("%s has no %s", where, r)
			}
		}
		for name := range props {
			if _, ok := v[name]; !ok && slices.Contains(required, any(name)) {
				s.t.Errorf("%s has no %s", where, name)
			}
		}
	case []any:
		good = m["type"] == "array"
		for i, item := range v {
			s.check(where+"["+strconv.Itoa(i)+"]", item, m["items"])
		}
	case string:
		good = m["type"] == "string"
	case float64:
		good = m["type"] == "number" || m["type"] == "integer" && v == float64(int64(v))
	case bool:
		good = m["type"] == "boolean"
	}
	if !good {
		s.t.Errorf("%s is %T, the schema says %v", where, v, m["type"])
	}
}

// TestOpenAPI holds docs/openapi.yaml against the handlers: the same methods on
// the same paths, and answers as it says.
func TestOpenAPI(t *testing.T) {
	s := &spec{t, readYAML(t, "../../docs/openapi.yaml")}
	var documented, served []string
	for path, methods := range s.doc["paths"].(map[string]any) {
		for method := range methods.(map[string]any) {
			documented = append(documented, strings.ToUpper(method)+" "+path)
		}
	}
	for _, r := range New(Config{}).routes {
		served = append(served, r.method+" "+r.path)
	}
	slices.Sort(documented)
	slices.Sort(served)
	if !slices.Equal(documented, served) {
		t.Fatalf("documented:\n%s\nserved:\n%s", strings.Join(documented, "\n"), strings.Join(served, "\n"))
	}

	path := serve(t, newState())
	asked := make(map[string]bool)
	for _, tt := range []struct {
		method, route, target, body string
		status                      int
	}{
		{"GET", "/v1/info", "", "", 200},
		{"POST", "/v1/forwards", "", `{"spec":"127.0.0.1:8080-8081:80-81"}`, 201},
		{"POST", "/v1/forwards", "", `{"spec":"127.0.0.1:8080:80"}`, 409},
		{"POST", "/v1/forwards", "", `{"spec":"127.0.0.1:80:80"}`, 403},
		{"POST", "/v1/forwards", "", `{"protocol":"tcp","host_path":"/x","guest":":80"}`, 201},
		{"POST", "/v1/forwards", "", `{}`, 400},
		{"POST", "/v1/forwards", "", strings.Repeat(" ", maxBody+1), 413},
		{"GET", "/v1/forwards", "", "", 200},
		{"DELETE", "/v1/forwards/{id}", "/v1/forwards/1", "", 204},
		{"DELETE", "/v1/forwards/{id}", "/v1/forwards/1", "", 404},
		{"GET", "/v1/flows", "", "", 200},
		{"DELETE", "/v1/flows/{id}", "/v1/flows/1", "", 204},
		{"DELETE", "/v1/flows/{id}", "/v1/flows/1", "", 404},
		{"GET", "/v1/leases", "", "", 200},
		{"GET", "/v1/stats", "", "", 200},
		{"GET", "/v1/log-level", "", "", 200},
		{"PUT", "/v1/log-level", "", `{"level":"debug"}`, 204},
		{"PUT", "/v1/log-level", "", `{"level":""}`, 400},
		{"GET", "/v1/dns", "", "", 200},
		{"PUT", "/v1/dns/{name}", "/v1/dns/b.test", `{"addresses":["::1"]}`, 204},
		{"POST", "/v1/dns/{name}", "/v1/dns/b.test", `{"addresses":["::2"]}`, 204},
		{"POST", "/v1/dns/{name}", "/v1/dns/b.test", `{"addresses":[]}`, 400},
		{"PUT", "/v1/dns/{name}", "/v1/dns/b.test", `{"addresses":[]}`, 400},
		{"DELETE", "/v1/dns/{name}", "/v1/dns/b.test", "", 204},
		{"DELETE", "/v1/dns/{name}", "/v1/dns/b.test", "", 404},
		{"GET", "/v1/capture", "/v1/capture?filter=tcp&snaplen=96", "", 200},
		{"GET", "/v1/capture", "/v1/capture?filter=bad", "", 400},
		{"GET", "/v1/capture", "/v1/capture?snaplen=x", "", 400},
		{"GET", "/v1/capture", "/v1/capture?length=1", "", 400},
		{"GET", "/metrics", "", "", 200},
	} {
		target := tt.target
		if target == "" {
			target = tt.route
		}
		status, body, header := do(t, path, tt.method, target, tt.body)
		name := tt.method + " " + tt.route + " " + strconv.Itoa(status)
		asked[tt.method+" "+tt.route] = true
		if status != tt.status {
			t.Errorf("%s: want status %d: %s", name, tt.status, body)
			continue
		}
		answer := s.at(s.doc, "paths", tt.route, strings.ToLower(tt.method), "responses", strconv.Itoa(status))
		if answer == nil {
			t.Errorf("%s: that status is not documented", name)
			continue
		}
		content, _ := s.at(answer, "content").(map[string]any)
		kind, _, _ := strings.Cut(header.Get("Content-Type"), ";")
		switch {
		case status == 204:
			if content != nil || body != "" {
				t.Errorf("%s: there is no body to it", name)
			}
		case content[kind] == nil:
			t.Errorf("%s: content type %q is not documented", name, kind)
		case kind == "application/json":
			var v any
			if err := json.Unmarshal([]byte(body), &v); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			s.check(name, v, s.at(content[kind], "schema"))
		}
	}
	for _, r := range served {
		if !asked[r] {
			t.Errorf("nothing asks for %s", r)
		}
	}
}
