// SPDX-License-Identifier: Apache-2.0

//go:build !nonet

package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The whole chain: the program as a process, loop devices, a server, reboots.
func TestFullChain(t *testing.T) {
	b := newLoopBoard(t)
	b.boot()
	if out := b.run(exitTempFail, "run"); !strings.Contains(out, "hint: accept the device") {
		t.Error("no hint for a device that is not accepted")
	}
	b.server.setDevice(boardID, "accepted")
	b.wait()
	dep := b.server.deploy("d-1", "release-2", []string{"qemu"}, b.release("release-2"))
	b.run(killed, "run")
	b.heard(dep, "downloading installing rebooting")
	if name := b.boot(); name != "release-2" || b.booted != "B" {
		t.Fatalf("%s booted from %s", name, b.booted)
	}
	b.run(0, "run")
	b.heard(dep, "downloading installing rebooting installing success")
	if inv := b.server.deviceByID(boardID).inventory; inv["artifact_name"] != "release-2" || inv["mendlet_slot"] != "B" {
		t.Errorf("got inventory %v", inv)
	}

	// One that does not boot; and no reboot without leave.
	dep = b.server.deploy("d-2", "broken", []string{"qemu"}, b.release("broken"))
	b.run(exitReboot, "run", "--no-reboot")
	b.run(exitReboot, "run", "--no-reboot") // the machine has not been down yet
	b.run(killed, "run")
	b.heard(dep, "downloading installing rebooting")
	if name := b.boot(); name != "release-2" || b.booted != "B" {
		t.Fatalf("%s booted from %s", name, b.booted)
	}
	b.run(exitFailed, "run")
	logs := b.heard(dep, "downloading installing rebooting failure")
	if text := fmt.Sprint(logs); !strings.Contains(text, "reverted") || !strings.Contains(text, "rebooting") {
		t.Errorf("the log lacks the cause, or what was said just before the reboot: %v", logs)
	}
	if first, last := logs[0].Message, logs[len(logs)-1].Message; first != `deployment "d-2": artifact "broken"` ||
		!strings.HasPrefix(last, `deployment "d-2" of "broken": rolled-back: upgrade failed and was reverted`) {
		t.Errorf("the log begins with %q and ends with %q", first, last)
	}
	for _, e := range logs {
		if strings.Contains(e.Message, " %, ") || strings.Contains(e.Message, "MB/s") {
			t.Errorf("progress in the log: %q", e.Message)
		}
	}
	b.run(0, "run")
	if b.run(0, "show-artifact") != "release-2\n" {
		t.Error("want release-2 installed")
	}

	// Cut off while it goes down: the next run of the same boot asks for the reboot again.
	dep = b.server.deploy("d-3", "release-3", []string{"qemu"}, b.release("release-3"))
	b.run(killed, "run")
	b.run(killed, "run")
	if name := b.boot(); name != "release-3" {
		t.Fatalf("%s booted", name)
	}
	b.run(0, "run", "--splay", "1000h") // does not wait with an update open
	b.heard(dep, "downloading installing rebooting installing success")
}

// The chains in which the server is asked, and some of the others with everything real: the
// program as a process, a server, a module, scripts.
func TestChainsWithServer(t *testing.T) {
	t.Parallel()
	artifact, err := os.ReadFile(newChainArtifacts(t).full)
	if err != nil {
		t.Fatal(err)
	}
	const (
		poll = "Idle.E Idle.L Sync.E Sync.L "
		end  = " C.E C C.L CL"
		back = " RB.E RB RB.L F.E F F.L CL"
		all  = "downloading installing installing success"
	)
	for _, row := range []struct {
		name, how string
		uses      []use // of "run"; says: what the server has heard until then
		stored    string
		result    string
	}{
		{"normal", "", []use{{"", 0, poll + "<INST>" + end, all}, {"", 0, poll, all}}, "new", ""},
		{"reboot", "answer NR Yes", []use{{"", 0, poll + "<INST> R.E R VR R.L" + end,
			"downloading installing rebooting installing success"}}, "new", ""},
		{"error in Idle.E", "fail Idle.E", []use{{"", 0, poll + "<INST>" + end, all}}, "new", ""},
		{"error in Idle.L", "fail Idle.L", []use{{"", 0, poll + "<INST>" + end, all}}, "new", ""},
		{"error in Sync.E", "once Sync.E", []use{{"", 1, "Idle.E Idle.L Sync.E Sync.X", ""},
			{"", 0, poll + "<INST>" + end, all}}, "new", ""},
		// The deployment is dropped without a word, and comes again with the next poll.
		{"error in Sync.L", "once Sync.L", []use{{"", 1, poll + "Sync.X", ""},
			{"", 0, poll + "<INST>" + end, all}}, "new", ""},
		{"error in I", "fail I", []use{{"", 1, poll + "<DL> I.E I I.X" + back, "downloading installing failure"}}, "old", ""},
		{"killed in D", "kill D", []use{{"", killed, poll + "D.E PPFS D", "downloading"},
			{"", 1, "CL", "downloading failure"}}, "old", "failed"},
		{"killed in I", "kill I", []use{{"", killed, poll + "<DL> I.E I", "downloading installing"},
			{"", 1, back, "downloading installing failure"}}, "old", ""},
		{"killed in C", "kill C", []use{{"", killed, poll + "<INST> C.E C", "downloading installing installing"},
			{"", 1, back, "downloading installing installing failure"}}, "old", ""},
		{"killed in C.L", "kill C.L", []use{{"", killed, poll + "<INST> C.E C C.L", "downloading installing installing"},
			{"", 0, "C.L CL", all}}, "new", ""},
		{"killed in CL", "kill CL", []use{{"", killed, poll + "<INST> C.E C C.L CL", "downloading installing installing"},
			{"", 0, "CL", all}}, "new", ""},
		{"killed in RB", "fail I; kill RB", []use{{"", killed, poll + "<DL> I.E I I.X RB.E RB", "downloading installing"},
			{"", 1, back, "downloading installing failure"}}, "old", ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			server := newTestServer(t, false)
			server.autoAccept = true
			deployed := server.deploy("deployment-1", "new", []string{"sim"}, artifact)
			d := newChainDevice(t, "")
			for _, s := range []string{"Idle_Enter_00", "Idle_Leave_00", "Sync_Enter_00", "Sync_Leave_00", "Sync_Error_00"} {
				putScript(t, d.dir+"/etc/scripts", s, actor, 0o755)
			}
			putScript(t, d.dir+"/share/identity", "mender-device-identity", "#!/bin/sh\necho mac=02:00:00:00:00:01\n", 0o755)
			d.put("etc/mender.conf", fmt.Sprintf(`{"ServerURL":%q}`, server.URL))
			d.arrange("answer NR No")
			d.arrange(row.how)
			for i, u := range row.uses {
				exit, _ := d.program("run", "--no-reboot")
				if exit != u.exit {
					t.Errorf("run %d: exit code %d, want %d", i+1, exit, u.exit)
				}
				if got, want := d.trace(), chainCalls(u.calls); got != want {
					t.Errorf("run %d: calls\ngot  %s\nwant %s", i+1, got, want)
				}
				if heard, _, _ := server.history(deployed); strings.Join(heard, " ") != u.says {
					t.Errorf("run %d: the server heard %q, want %q", i+1, heard, u.says)
				}
			}
			d.checkStored(row.stored, row.result, false)
		})
	}
}

// A rootfs-image that fails when the boot environment points to it already, but before the
// reboot: the old system runs, so there is nothing to reboot for. Mender reboots.
func TestNoRebootForNothing(t *testing.T) {
	s := newManagedSetup(t)
	s.artifacts["scripted"] = filepath.Join(s.dir, "scripted.mender")
	script := writeTemp(t, "ArtifactInstall_Leave_00", []byte("#!/bin/sh\nexit 1\n"))
	if err := packCommand([]string{"-n", "scripted", "-c", "sim", "-f", filepath.Join(s.dir, "new.img"), "-s", script,
		"-o", s.artifacts["scripted"]}, io.Discard, nil); err != nil {
		t.Fatal(err)
	}
	d, deployed := s.device(t, "scripted")
	if err := d.settleManaged(s.server.URL, deployed.id); err != nil {
		t.Fatal(err)
	}
	if err := d.check("scripted"); err != nil {
		t.Error(err)
	}
	rec, err := d.peek()
	if err != nil {
		t.Fatal(err)
	}
	heard, _, _ := s.server.history(deployed)
	if got := strings.Join(heard, " "); got != "downloading installing failure" ||
		rec.Last.Result != "rolled-back" || d.boots != 1 {
		t.Errorf("heard %q, verdict %s, %d boots; want \"downloading installing failure\", rolled-back, 1", got,
			rec.Last.Result, d.boots)
	}
}

// Where the program reboot fails, the kernel is asked, and that is said. In a PID namespace of its own
// reboot(2) ends that alone.
func TestRebootByTheKernel(t *testing.T) {
	b := newLoopBoard(t)
	b.server.autoAccept = true
	writeScript(t, b.dir+"/bin/reboot", "echo not today; exit 5", 0o755)
	b.unshare = []string{"-p", "-f", "--mount-proc"}
	b.boot()
	dep := b.server.deploy("d-1", "release-2", []string{"qemu"}, b.release("release-2"))
	out := b.run(killed, "run")
	for _, want := range []string{`program "reboot": exit status 5`, "not today", "the kernel restarts the machine"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q", want)
		}
	}
	b.heard(dep, "downloading installing rebooting")
	if name := b.boot(); name != "release-2" {
		t.Errorf("%s booted", name)
	}
	b.run(0, "run")
	b.heard(dep, "downloading installing rebooting installing success")
}
