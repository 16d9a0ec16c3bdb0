package e2e

import (
	"encoding/json"
	"os"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// perfVariable turns the comparison of speeds from a line in the log into a
// test that can fail. It wants a machine with nothing else to do.
const perfVariable = "USERNET_PERF"

// TestFasterThanSlirp4netns: at an MTU of 1500 usernet is to move at least
// three times as much as slirp4netns, in both directions.
func TestFasterThanSlirp4netns(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "iperf3", "slirp4netns")
	if testing.Short() && os.Getenv(perfVariable) == "" {
		t.Skip("short")
	}
	var theirUp, theirDown float64
	t.Run("slirp4netns", func(t *testing.T) {
		theirUp, theirDown = speed(t, "slirp4netns", rig.TunOpen)
	})
	for _, l := range links {
		t.Run(l.name, func(t *testing.T) {
			up, down := speed(t, "usernet", l.tun, l.flags...)
			t.Logf("Gbit/s out: %.2f, slirp4netns %.2f (%.1f times); in: %.2f, slirp4netns %.2f (%.1f times)",
				up, theirUp, up/theirUp, down, theirDown, down/theirDown)
			if os.Getenv(perfVariable) == "1" && (up < 3*theirUp || down < 3*theirDown) {
				t.Errorf("not three times as fast")
			}
		})
	}
}

// speed measures Gbit/s from a guest to the host's loopback, and back.
func speed(t *testing.T, subject string, tun rig.Tun, flags ...string) (up, down float64) {
	t.Helper()
	n := rig.New(t, rig.Options{Tun: tun})
	guest := n.Guest(t)
	n.AttachSubject(t, subject, guest, append([]string{"--host-loopback", "--mtu", "1500"}, flags...)...)
	return iperf(t, n.Host, guest), iperf(t, n.Host, guest, "-R")
}

// iperf measures Gbit/s from a guest to the host's loopback, unless flags say
// otherwise.
func iperf(t *testing.T, server, client *rig.Node, flags ...string) float64 {
	t.Helper()
	// A server of more than one client resets those that come too early.
	p := server.Exec(t, rig.Command{Args: []string{"iperf3", "-s", "-1", "--forceflush"}})
	p.WaitOutput(t, "listening", time.Minute)
	defer p.Wait(10 * time.Second)
	args := append([]string{"iperf3", "-J", "-t", "3", "-c", rig.Current().Gateway4.String()}, flags...)
	out := client.RunFor(t, 30*time.Second, args...)
	var report struct {
		End struct {
			Received struct {
				Rate float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
		Error string `json:"error"`
	}
	if err := json.Unmarshal([]byte(out.Stdout), &report); err != nil || report.Error != "" {
		t.Fatalf("iperf3: %v %s\n%s", err, report.Error, out.Stderr)
	}
	return report.End.Received.Rate / 1e9
}
