// Package e2e tests the real binary with real programs, in the rig's
// namespaces and as an ordinary user.
package e2e
