// SPDX-License-Identifier: Apache-2.0

// Bench installs one image with mendlet and with other updaters, in turns, and writes a table
// and a plot of the ratios. It wants to be root in a mount namespace of its own, with two loop
// devices to write on: rig/bench-peers.sh sees to all that.
package main

import (
	"bufio"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
)

// bench is one run of the whole.
type bench struct {
	dir     string // of everything that is made, absolute
	image   string // what is installed
	sum     [32]byte
	size    int64  // of the image, bytes
	other   string // previous content that differs everywhere
	slotA   string // device node of the slot that runs
	slotB   string // and of the one that is written
	mendlet string
	url     string // of dir, over loopback
	runs    int
	rows    *regexp.Regexp
	only    *regexp.Regexp // peers
}

// row is one kind of work, the same for every peer.
type row struct {
	comp string // none gzip xz zstd
	http bool   // else from a local file
	same bool   // the slot has the image already
}

func (r row) String() string {
	s := r.comp + ", "
	if r.http {
		s += "HTTP"
	} else {
		s += "file"
	}
	if r.same {
		return s + ", same content"
	}
	return s
}

func allRows() []row {
	var rows []row
	for _, at := range []row{{}, {same: true}, {http: true}, {http: true, same: true}} {
		for _, comp := range []string{"none", "gzip", "xz", "zstd"} {
			at.comp = comp
			rows = append(rows, at)
		}
	}
	return rows
}

// helpers are what rig/bench-delta.sh wants of this program.
var helpers = map[string]func(args []string) error{"link": linkMain, "adaptive": adaptiveMain, "measure": measureMain}

func main() {
	runtime.LockOSThread() // what is started is killed when its starter, which is a thread, ends
	if len(os.Args) > 1 && helpers[os.Args[1]] != nil {
		if err := helpers[os.Args[1]](os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	b := &bench{}
	rows, only, doc := "", "", ""
	flag.StringVar(&b.dir, "dir", "", "directory for everything that is made")
	flag.StringVar(&b.image, "image", "", "image to install")
	flag.StringVar(&b.slotA, "a", "", "loop device that plays the running slot")
	flag.StringVar(&b.slotB, "b", "", "loop device to write on")
	flag.StringVar(&b.mendlet, "mendlet", "", "mendlet binary")
	flag.IntVar(&b.runs, "runs", 5, "runs of each")
	flag.StringVar(&rows, "rows", ".", "regular expression of rows, as \"xz, file\"")
	flag.StringVar(&only, "peers", ".", "regular expression of peers")
	flag.StringVar(&doc, "doc", "", "directory of performance.md and performance.svg; \"\" prints only")
	flag.Parse()
	var err error
	if b.rows, err = regexp.Compile(rows); err == nil {
		b.only, err = regexp.Compile(only)
	}
	if err == nil {
		err = b.all(doc)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (b *bench) all(doc string) error {
	for _, p := range []*string{&b.dir, &b.image, &b.mendlet} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return err
		}
		*p = abs
	}
	// A device that is open is not detached by somebody else's losetup -D.
	for _, dev := range []string{b.slotA, b.slotB} {
		f, err := os.Open(dev)
		if err != nil {
			return err
		}
		defer f.Close()
	}
	if err := errors.Join(b.prepareContents(), b.payloads(), b.identityScript()); err != nil {
		return err
	}
	if err := b.serve(); err != nil {
		return err
	}
	peers, closers, notes := b.peers()
	for _, c := range closers {
		defer c()
	}
	res := &results{runs: b.runs, notes: notes, load: loadavg()}
	for _, p := range peers {
		res.peers = append(res.peers, p.name)
	}
	for _, r := range allRows() {
		if b.rows.MatchString(r.String()) {
			res.rows = append(res.rows, r)
		}
	}
	for n := 0; n < b.runs; n++ {
		if err := b.round(n, res, peers); err != nil {
			return err
		}
	}
	res.version = firstLine(b.mendlet, "--version")
	res.machine = fmt.Sprintf("%d cores %s", runtime.NumCPU(), runtime.GOARCH)
	return res.write(os.Stdout, doc)
}

// round does everything once, so that what else the machine does falls on all alike.
func (b *bench) round(n int, res *results, peers []*peer) error {
	for _, f := range b.floors() {
		m, err := f.measure(b)
		if err != nil {
			return fmt.Errorf("floor, %s: %w", f.name, err)
		}
		res.addFloor(f.name, m)
	}
	for _, p := range peers {
		m, err := command(exec.Command(p.bin, "--version"), nil, nil)
		if err != nil {
			return err
		}
		res.put("start "+p.name, m)
		if p.name == "mendlet" || p.name == "mender" {
			if n == 0 { // the first time makes a key
				_, _, err = b.poll(p)
			}
			var later measured
			if err == nil {
				m, later, err = b.poll(p)
			}
			if err != nil {
				return fmt.Errorf("%s: poll: %w", p.name, err)
			}
			res.put("poll "+p.name, m)
			res.put("poll again "+p.name, later)
		}
	}
	for _, r := range res.rows {
		for i := range peers {
			p := peers[(i+n)%len(peers)] // nobody is always the first
			if why := p.cannot[r.comp]; why != "" {
				continue
			}
			if why := p.cannot["HTTP"]; why != "" && r.http {
				continue
			}
			m, err := b.install(p, r)
			if err != nil {
				// One that cannot do a row must not hold up the others.
				fmt.Fprintf(os.Stderr, "%s: %s: %v\n", p.name, r, err)
				res.fail(p.name, r, err)
				continue
			}
			fmt.Fprintf(os.Stderr, "run %d  %-28s %-10s %6.2f s %6.2f s cpu %6.1f MiB, wrote %d MiB\n",
				n+1, r, p.name, m.wall, m.cpu, m.rss/(1<<20), m.wrote>>20)
			res.add(p.name, r, m)
		}
	}
	return nil
}

// prepareContents makes what the slot has before, and reads the image into the page cache.
func (b *bench) prepareContents() error {
	f, err := os.Open(b.image)
	if err != nil {
		return err
	}
	defer f.Close()
	if b.sum, b.size, err = sumOf(f); err != nil {
		return err
	}
	b.other = filepath.Join(b.dir, "other.img")
	if st, err := os.Stat(b.other); err == nil && st.Size() == b.size {
		return nil
	}
	o, err := os.Create(b.other)
	if err != nil {
		return err
	}
	_, err = io.CopyN(o, rand.Reader, b.size)
	return errors.Join(err, o.Sync(), o.Close())
}

// serve gives b.dir out over HTTP on a loopback port.
func (b *bench) serve() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	b.url = "http://" + l.Addr().String()
	go http.Serve(l, http.FileServer(http.Dir(b.dir)))
	return nil
}

func loadavg() string {
	s, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Fields(string(s))[0]
}

func firstLine(name string, arg ...string) string {
	out, err := output(name, arg...)
	if err != nil {
		return "unknown"
	}
	s := bufio.NewScanner(strings.NewReader(out))
	s.Scan()
	return strings.Join(strings.Fields(s.Text()), " ")
}
