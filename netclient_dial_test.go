// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const dialHost = "device.test" // for which testCA makes certificates

// asks makes the client ask only this name server.
func asks(s *dnsServer) func(*dialer) {
	return func(d *dialer) {
		d.Timeout = 3 * time.Second // a question of the standard library that is not answered takes 10
		d.Resolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, s.addr)
		}}
	}
}

var (
	home4 = net.IPv4(127, 0, 0, 1)
	home6 = net.IPv6loopback
)

// oddDNS are name servers that know but one kind of question; each has the address.
var oddDNS = map[string]func(q dnsQuestion) dnsAnswer{
	"FORMERR to EDNS(0)": func(q dnsQuestion) dnsAnswer {
		if q.opt {
			return dnsAnswer{code: dnsFormErr}
		}
		return dnsAnswer{ips: []net.IP{home4}}
	},
	"NOTIMP to EDNS(0)": func(q dnsQuestion) dnsAnswer {
		if q.opt {
			return dnsAnswer{code: dnsNotImp}
		}
		return dnsAnswer{ips: []net.IP{home4}}
	},
	"silent to EDNS(0)": func(q dnsQuestion) dnsAnswer { return dnsAnswer{silent: q.opt, ips: []net.IP{home4}} },
	"silent to AAAA": func(q dnsQuestion) dnsAnswer {
		return dnsAnswer{silent: q.kind == kindAAAA,
			ips: []net.IP{home4}}
	},
	"NXDOMAIN to AAAA": notForAAAA(dnsNXDomain),
	"SERVFAIL to AAAA": notForAAAA(dnsServFail),
	"NOTIMP to AAAA":   notForAAAA(dnsNotImp),
	"REFUSED to AAAA":  notForAAAA(dnsRefused),
}

func notForAAAA(code byte) func(q dnsQuestion) dnsAnswer {
	return func(q dnsQuestion) dnsAnswer {
		if q.kind == kindAAAA {
			return dnsAnswer{code: code}
		}
		return dnsAnswer{ips: []net.IP{home4}}
	}
}

func TestOddNameServers(t *testing.T) {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "here") }))
	t.Cleanup(web.Close)
	_, port, _ := net.SplitHostPort(web.Listener.Addr().String())
	for name, answer := range oddDNS {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			hc := testHTTPClient(t, testConfig(t), netOptions{tuneDialer: asks(startDNS(t, "127.0.0.1:0", answer))})
			if got, err := fetch(hc, "http://"+net.JoinHostPort(dialHost, port)); got != "here" {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
	// What a person is told is what says most.
	for code, want := range map[byte]string{dnsNXDomain: "no such host", dnsServFail: "server misbehaving"} {
		hc := testHTTPClient(t, testConfig(t), netOptions{tuneDialer: asks(startDNS(t, "127.0.0.1:0",
			func(q dnsQuestion) dnsAnswer {
				if q.kind == kindAAAA {
					return dnsAnswer{code: dnsNXDomain}
				}
				return dnsAnswer{code: code}
			}))})
		_, err := fetch(hc, "http://"+net.JoinHostPort(dialHost, port))
		wantCode(t, err, exitTempFail)
		if !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// The system's own resolver, in a network of its own: with the configuration files that there are.
func TestResolverInNamespace(t *testing.T) {
	t.Parallel()
	const marker = "MENDLET_TEST_RESOLV"
	if os.Getenv(marker) == "" {
		for _, tool := range []string{"unshare", "mount", "ip"} {
			if _, err := exec.LookPath(tool); err != nil {
				t.Skipf("needs %s", tool)
			}
		}
		if os.Getuid() != 0 {
			t.Skip("needs root: a network and a resolv.conf of its own")
		}
		file := filepath.Join(t.TempDir(), "resolv.conf")
		must(t, os.WriteFile(file, nil, 0o644))
		cmd := exec.Command("unshare", "-n", "-m", "sh", "-ec", `ip link set lo up; mount --bind "$1" /etc/resolv.conf
			exec "$0" -test.run='^TestResolverInNamespace$' -test.v`, os.Args[0], file)
		cmd.Env = append(os.Environ(), marker+"="+file)
		out, err := cmd.CombinedOutput()
		if strings.Contains(string(out), "--- SKIP") {
			t.Skipf("%s", out)
		}
		if err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "here") }))
	defer web.Close()
	_, port, _ := net.SplitHostPort(web.Listener.Addr().String())
	for _, c := range []struct{ name, resolv, host string }{
		{"one name server", "nameserver 127.0.0.1\n", dialHost},
		{"odd lines", "# comment\n; other\nnameserver 127.0.0.1 # home\nnameserver\nsortlist 10.0.0.0\noptions\noptions " +
			"ndots:99 timeout:x attempts:0 edns0 no-tld-query\nlookup file bind\n", dialHost},
		{"DOS line ends", "nameserver 127.0.0.1\r\noptions ndots:1\r\n", dialHost},
		{"the first is refused, the second silent", "nameserver 127.0.0.2\nnameserver 127.0.0.3\nnameserver " +
			"127.0.0.1\noptions timeout:1\n", dialHost},
		{"more than three", "nameserver 127.0.0.1\nnameserver 127.0.0.2\nnameserver 127.0.0.4\nnameserver 127.0.0.5\n",
			dialHost},
		{"a search list", "nameserver 127.0.0.1\nsearch nowhere.example test\n", "device"},
		{"a full name and a search list that has everything", "nameserver 127.0.0.1\nsearch wild.example\n", dialHost},
		{"one at a time", "nameserver 127.0.0.1\noptions single-request-reopen rotate\n", dialHost},
		{"none: this machine", "\n", dialHost},
	} {
		t.Run(c.name, func(t *testing.T) {
			must(t, os.WriteFile(os.Getenv(marker), []byte(c.resolv), 0o644))
			startDNS(t, "127.0.0.3:53", func(dnsQuestion) dnsAnswer { return dnsAnswer{silent: true} })
			home := startDNS(t, "127.0.0.1:53", func(q dnsQuestion) dnsAnswer {
				switch {
				case q.opt:
					return dnsAnswer{code: dnsFormErr}
				case q.name == dialHost+".":
					return dnsAnswer{ips: []net.IP{home4}}
				case strings.HasSuffix(q.name, ".wild.example."):
					return dnsAnswer{ips: []net.IP{net.IPv4(127, 0, 0, 99)}}
				}
				return dnsAnswer{code: dnsNXDomain}
			})
			// The standard library looks at the file every five seconds; a new process at once.
			cmd := exec.Command(os.Args[0], "-test.run=^TestResolverChild$", "-test.v")
			cmd.Env = append(os.Environ(), "MENDLET_TEST_FETCH=http://"+net.JoinHostPort(c.host, port))
			if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "got here") {
				t.Errorf("%v: %s; the name server was asked %v", err, out, home.questions())
			}
		})
	}
}

func TestResolverChild(t *testing.T) {
	url := os.Getenv("MENDLET_TEST_FETCH")
	if url == "" {
		t.Skip("a part of TestResolverInNamespace")
	}
	got, err := fetch(testHTTPClient(t, testConfig(t), netOptions{}), url)
	must(t, err)
	t.Log("got " + got)
}

// listenBoth takes one port on both loopback addresses.
func listenBoth(t *testing.T) (four, six net.Listener, port string) {
	t.Helper()
	for range 20 {
		four, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		_, port, _ := net.SplitHostPort(four.Addr().String())
		six, err := net.Listen("tcp", "[::1]:"+port)
		if err == nil {
			t.Cleanup(func() { four.Close(); six.Close() })
			return four, six, port
		}
		four.Close()
		if errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT) {
			t.Skipf("needs IPv6: %v", err)
		}
	}
	t.Fatal("no port that is free for both")
	return nil, nil, ""
}

// IPv6 that takes connections and then loses what comes, as tunnels with a smaller MTU do: the
// other address is tried, and from then on at once.
func TestBrokenIPv6(t *testing.T) {
	for name, broken := range map[string]func(net.Conn){
		"silent": func(c net.Conn) { io.Copy(io.Discard, c) },
		"reset":  func(c net.Conn) { io.CopyN(io.Discard, c, 1); c.(*net.TCPConn).SetLinger(0); c.Close() },
		"closed": func(c net.Conn) { io.CopyN(io.Discard, c, 100); c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			four, six, port := listenBoth(t)
			ca := newTestCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
			tlsServerOn(t, four, ca, &tls.Config{})
			tried := make(chan bool, 10)
			go func() {
				for {
					c, err := six.Accept()
					if err != nil {
						return
					}
					tried <- true
					go broken(c)
				}
			}()
			dns := startDNS(t, "127.0.0.1:0", func(q dnsQuestion) dnsAnswer { return dnsAnswer{ips: []net.IP{home4, home6}} })
			cfg := testConfig(t)
			cfg.ServerCertificate = ca.pem
			cfg.Connectivity.DisableKeepAlive = true
			var made *dialer
			hc := testHTTPClient(t, cfg, netOptions{tuneDialer: func(d *dialer) {
				asks(dns)(d)
				made = d
			}})
			if name == "silent" { // else, and after that, a handshake may take its time: the machine may be busy
				made.first = 300 * time.Millisecond
			}
			for range 3 {
				if got, err := fetch(hc, "https://"+net.JoinHostPort(dialHost, port)); got != "HTTP/1.1 0" {
					t.Fatalf("got %q, %v", got, err)
				}
				made.first = firstHandshake
			}
			if len(tried) != 1 {
				t.Errorf("the broken address was tried %d times, want once", len(tried))
			}
		})
	}
}

// A path that loses large packets: the second try of a handshake, and the connection after a
// stall, do without them.
func TestLargePacketsLost(t *testing.T) {
	var latest atomic.Pointer[dialer] // a handler of the first server may still ask when the second client is made
	tune := netOptions{tuneDialer: func(made *dialer) {
		made.first = 200 * time.Millisecond
		latest.Store(made)
	}}
	lost := func() bool {
		d := latest.Load()
		d.mu.Lock()
		defer d.mu.Unlock()
		return !d.narrow
	}
	ca := newTestCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	s := tlsServer(t, ca, &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		for end := time.Now().Add(time.Minute); lost() && time.Now().Before(end); {
			time.Sleep(time.Millisecond) // what the black hole takes never comes; the client gives up
		}
		return nil, nil
	}})
	cfg := testConfig(t)
	cfg.ServerCertificate = ca.pem
	if got, err := fetch(testHTTPClient(t, cfg, tune), s.URL); err != nil || lost() {
		t.Errorf("handshake: got %q, %v", got, err)
	}
	f := newFlaky(t, 9000, func(f *flaky, n int, w http.ResponseWriter, r *http.Request) {
		if lost() {
			<-r.Context().Done()
		}
		f.serve(w, r)
	})
	f.hc = testHTTPClient(t, testConfig(t), tune)
	if _, _, err := f.get(t, downloadOptions{stall: 100 * time.Millisecond}); err != nil || len(f.ranges) < 2 {
		t.Errorf("download: got %v after %d requests", err, len(f.ranges))
	}
	// What a narrow connection is.
	raw, err := latest.Load().DialContext(t.Context(), "tcp", f.Listener.Addr().String())
	must(t, err)
	defer raw.Close()
	rc, err := raw.(*net.TCPConn).SyscallConn()
	must(t, err)
	must(t, rc.Control(func(fd uintptr) {
		mss, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG)
		if err != nil || mss > narrowSegment {
			t.Errorf("got segments of %d bytes, %v, want %d at most", mss, err, narrowSegment)
		}
		limit, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout)
		if err != nil || limit != int(unackedTimeout.Milliseconds()) {
			t.Errorf("got a user time-out of %d ms, %v", limit, err)
		}
	}))
}

// onePacket is a gateway that resets a connection whose ClientHello is longer than a packet of an
// Ethernet, as some load balancers and firewalls do.
func onePacket(t *testing.T, target string) (addr string, hellos func() []int) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { l.Close() })
	var mu sync.Mutex
	var sizes []int
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer in.Close()
				head := make([]byte, 5) // of a record: type, version, length (RFC 8446, 5.1)
				if _, err := io.ReadFull(in, head); err != nil {
					return
				}
				size := 5 + int(binary.BigEndian.Uint16(head[3:]))
				mu.Lock()
				sizes = append(sizes, size)
				mu.Unlock()
				if size > 1460 {
					in.(*net.TCPConn).SetLinger(0)
					return
				}
				out, err := net.Dial("tcp", target)
				if err != nil {
					return
				}
				defer out.Close()
				out.Write(head)
				go func() { io.Copy(in, out); in.Close() }()
				io.Copy(out, in)
			}()
		}
	}()
	return l.Addr().String(), func() []int {
		mu.Lock()
		defer mu.Unlock()
		return append([]int{}, sizes...)
	}
}

// The first message of TLS fits into one packet, also after a server has given a ticket that does not.
func TestHelloInOnePacket(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, ticket := range []int{0, 2000} {
			ca := newTestCA(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
			conf := &tls.Config{MaxVersion: version}
			if ticket > 0 {
				conf.WrapSession = func(tls.ConnectionState, *tls.SessionState) ([]byte, error) { return make([]byte, ticket), nil }
				conf.UnwrapSession = func([]byte, tls.ConnectionState) (*tls.SessionState, error) { return nil, nil }
			}
			s := tlsServer(t, ca, conf)
			addr, hellos := onePacket(t, s.Listener.Addr().String())
			cfg := testConfig(t)
			cfg.ServerCertificate = ca.pem
			cfg.Connectivity.DisableKeepAlive = true
			hc := testHTTPClient(t, cfg, netOptions{})
			for range 3 {
				if _, err := fetch(hc, "https://"+addr); err != nil {
					t.Fatalf("TLS %x, ticket of %d bytes: %v, hellos of %d bytes", version, ticket, err, hellos())
				}
			}
			sizes := hellos()
			if len(sizes) != 3 || sizes[0] > 600 || (sizes[2] > sizes[0]) != (ticket == 0) {
				t.Errorf("TLS %x, ticket of %d bytes: got hellos of %d bytes", version, ticket, sizes)
			}
		}
	}
}
