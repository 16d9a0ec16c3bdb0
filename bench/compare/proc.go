package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// userHZ is the unit of the times in /proc/PID/stat on every Linux.
const userHZ = 100

// stat is what /proc/PID/stat says of one process.
type stat struct {
	state  byte
	parent int
	cpu    time.Duration // user and system time of all its threads
}

func readStat(pid int) (stat, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return stat{}, err
	}
	return parseStat(data)
}

func parseStat(data []byte) (stat, error) {
	// The name may hold anything, brackets and blanks included.
	end := bytes.LastIndexByte(data, ')')
	fields := strings.Fields(string(data[end+1:]))
	if end < 0 || len(fields) < 13 {
		return stat{}, fmt.Errorf("parse stat: %q", data)
	}
	parent, err1 := strconv.Atoi(fields[1])
	user, err2 := strconv.ParseInt(fields[11], 10, 64)
	system, err3 := strconv.ParseInt(fields[12], 10, 64)
	if err1 != nil || err2 != nil || err3 != nil {
		return stat{}, fmt.Errorf("parse stat: %q", data)
	}
	return stat{state: fields[0][0], parent: parent, cpu: time.Duration(user+system) * time.Second / userHZ}, nil
}

// tree lists a process and all its living descendants.
func tree(root int) []int {
	children := map[int][]int{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return []int{root}
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if s, err := readStat(pid); err == nil && s.state != 'Z' {
			children[s.parent] = append(children[s.parent], pid)
		}
	}
	pids := []int{root}
	for i := 0; i < len(pids); i++ {
		pids = append(pids, children[pids[i]]...)
	}
	return pids
}

// alive tells whether a process still runs.
func alive(pid int) bool {
	s, err := readStat(pid)
	return err == nil && s.state != 'Z'
}

// cpuTime is the CPU time of a process and its descendants so far.
func cpuTime(root int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range tree(root) {
		s, err := readStat(pid)
		if err != nil && pid == root {
			return 0, fmt.Errorf("read CPU time: %w", err)
		}
		sum += s.cpu
	}
	return sum, nil
}

// fineCPUTime is cpuTime in the scheduler's nanoseconds. Threads that have
// ended are not in it, so it serves only where none ends.
func fineCPUTime(root int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range tree(root) {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		if err != nil || len(tasks) == 0 {
			return cpuTime(root)
		}
		for _, task := range tasks {
			data, err := os.ReadFile(task)
			if err != nil {
				continue
			}
			first, _, _ := strings.Cut(string(data), " ")
			ns, err := strconv.ParseInt(first, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("parse %s: %w", task, err)
			}
			sum += time.Duration(ns)
		}
	}
	return sum, nil
}

// cpuIdle is the idle time of all CPUs since boot.
func cpuIdle() time.Duration {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	idle, _ := parseIdle(data)
	return idle
}

func parseIdle(data []byte) (time.Duration, error) {
	line, _, _ := strings.Cut(string(data), "\n")
	f := strings.Fields(line)
	if len(f) < 6 || f[0] != "cpu" {
		return 0, fmt.Errorf("parse /proc/stat: %q", line)
	}
	idle, err1 := strconv.ParseInt(f[4], 10, 64)
	iowait, err2 := strconv.ParseInt(f[5], 10, 64)
	if err1 != nil || err2 != nil {
		return 0, fmt.Errorf("parse /proc/stat: %q", line)
	}
	return time.Duration(idle+iowait) * time.Second / userHZ, nil
}

// pss is the proportional set size in bytes of a process and its descendants.
func pss(root int) (int64, error) {
	var sum int64
	for _, pid := range tree(root) {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return 0, fmt.Errorf("read memory: %w", err)
		}
		n, err := parsePSS(data)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

func parsePSS(data []byte) (int64, error) {
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) == 3 && f[0] == "Pss:" {
			kb, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("parse Pss: %w", err)
			}
			return kb * 1024, nil
		}
	}
	return 0, fmt.Errorf("parse smaps_rollup: no Pss in it")
}

// listening tells whether some process listens on a TCP port of this network
// namespace. Asking by connecting would use up a server that serves once.
func listening(port int) bool { return listeningIn("/proc/net", port) }

// listeningIn is listening in the namespace whose tables are in dir.
func listeningIn(dir string, port int) bool {
	for _, path := range []string{dir + "/tcp", dir + "/tcp6"} {
		data, err := os.ReadFile(path)
		if err == nil && hasListener(data, port) {
			return true
		}
	}
	return false
}

func hasListener(table []byte, port int) bool {
	want := fmt.Sprintf(":%04X", port)
	lines := bufio.NewScanner(bytes.NewReader(table))
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) > 3 && strings.HasSuffix(f[1], want) && f[3] == "0A" {
			return true
		}
	}
	return false
}
