package dhcp

import "strings"

// domains returns the names that can be encoded, without trailing dots. What
// comes from a resolv.conf is not always a name.
func domains(names []string) []string {
	var ok []string
	for _, n := range names {
		n = strings.TrimSuffix(n, ".")
		if n == "" || len(n) > 253 {
			continue
		}
		good := true
		for l := range strings.SplitSeq(n, ".") {
			good = good && l != "" && len(l) <= 63
		}
		if good {
			ok = append(ok, n)
		}
	}
	return ok
}

// appendName appends a name of domains in wire format (RFC 1035 §3.1).
func appendName(b []byte, name string) []byte {
	for l := range strings.SplitSeq(name, ".") {
		b = append(append(b, byte(len(l))), l...)
	}
	return append(b, 0)
}

// compressed returns as many of the names as fit in limit bytes, with pointers
// to what is in the list already (RFC 3397 §2). A pointer never leads to
// another pointer, which not every client follows.
func compressed(names []string, limit int) []byte {
	var b []byte
	at := make(map[string]int) // offset of each name and of its parents
	for _, name := range names {
		n := b
		rest, pointer := name, false
		for rest != "" {
			if off, ok := at[rest]; ok {
				n, pointer = append(n, 0xc0|byte(off>>8), byte(off)), true
				break
			}
			l, r, _ := strings.Cut(rest, ".")
			n = append(append(n, byte(len(l))), l...)
			rest = r
		}
		if !pointer {
			n = append(n, 0)
		}
		if len(n) > limit {
			break
		}
		for off, rest := len(b), name; rest != "" && !pointer && off < 1<<14; {
			if _, ok := at[rest]; !ok {
				at[rest] = off
			}
			l, r, _ := strings.Cut(rest, ".")
			off, rest = off+1+len(l), r
		}
		b = n
	}
	return b
}

// hostname returns a client's name for itself if it is one, for people to read.
func hostname(b []byte) string {
	if len(b) == 0 || len(b) > 253 {
		return ""
	}
	for _, c := range b {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return ""
		}
	}
	return string(b)
}
