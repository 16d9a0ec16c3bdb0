package control

import (
	"bufio"
	"fmt"
	"io"
	"reflect"
	"strings"

	"github.com/usernet/usernet"
)

// metrics is the body of GET /metrics, in the text format 0.0.4 of Prometheus.
// Its library would take a millisecond of every start, in each of usernet's
// processes, to be able to say the same.
type metrics struct {
	version string
	info    usernet.Info
	stats   usernet.Stats
}

// sections say what the parts of [usernet.Stats] count.
var sections = map[string]string{
	"flows":    "Flows of the guest, and their payload from (up) and to (down) it",
	"link":     "Frames on the guest's link, seen from the gateway",
	"dropped":  "What was lost, by reason",
	"denied":   "What the egress policy has closed, by reason",
	"netstack": "Packets and segments on the guest's side",
	"dns":      "Queries of the guest",
	"dhcp4":    "DHCPv4 messages",
	"dhcp6":    "DHCPv6 messages",
	"forwards": "Published ports",
	"process":  "The process that serves",
}

// label escapes the value of a label.
var label = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

func (m metrics) write(to io.Writer) {
	w := bufio.NewWriter(to)
	defer w.Flush()
	fmt.Fprintf(w, "# HELP usernet_info What this network is.\n# TYPE usernet_info gauge\nusernet_info{version=\"%s\",interface=\"%s\",link=\"%s\"} 1\n",
		label.Replace(m.version), label.Replace(m.info.Interface), label.Replace(m.info.Link))
	if !m.info.Since.IsZero() {
		fmt.Fprintf(w, "# HELP usernet_start_time_seconds When the network began.\n# TYPE usernet_start_time_seconds gauge\nusernet_start_time_seconds %.3f\n",
			float64(m.info.Since.UnixMilli())/1000)
	}
	v := reflect.ValueOf(m.stats)
	for i := range v.NumField() {
		field, name := v.Field(i), member(v.Type().Field(i))
		if field.Kind() == reflect.Pointer {
			if field.IsNil() {
				continue
			}
			field = field.Elem()
		}
		switch {
		case field.Kind() != reflect.Struct:
			one(w, "usernet_"+name, "gauge", sections[name], field)
		case name == "dropped" || name == "denied":
			fmt.Fprintf(w, "# HELP usernet_%s_total %s.\n# TYPE usernet_%[1]s_total counter\n", name, sections[name])
			for j := range field.NumField() {
				fmt.Fprintf(w, "usernet_%s_total{reason=\"%s\"} %v\n", name, member(field.Type().Field(j)), field.Field(j))
			}
		default:
			for j := range field.NumField() {
				part := member(field.Type().Field(j))
				help := sections[name] + ": " + strings.ReplaceAll(part, "_", " ")
				if now, gauge := strings.CutSuffix(part, "_now"); gauge {
					one(w, "usernet_"+name+"_"+now, "gauge", help, field.Field(j))
				} else {
					one(w, "usernet_"+name+"_"+part+"_total", "counter", help, field.Field(j))
				}
			}
		}
	}
}

func one(w io.Writer, name, kind, help string, v reflect.Value) {
	fmt.Fprintf(w, "# HELP %s %s.\n# TYPE %s %s\n%s %v\n", name, help, name, kind, name, v)
}

// member returns the name of a field in JSON.
func member(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	return name
}
