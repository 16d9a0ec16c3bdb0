// Package tap opens a TAP device inside a network namespace and is its gVisor link endpoint.
package tap
