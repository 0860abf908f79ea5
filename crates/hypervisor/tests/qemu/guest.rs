//! A tiny Linux guest: a Debian kernel and busybox, made once and kept beside the build; on demand with Debian's guest
//! agent and the hooks that we ship.

use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// In the order in which they need each other.
const MODULES: [&str; 9] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
];

/// What a channel to the host needs besides.
const AGENT_MODULE: &str = "virtio_console";

/// The agent with our hook, and a file system that is written to all the time. The hook that the tests control does what
/// the first word on the second disk says.
const AGENT: &str = "#!/bin/busybox sh
mkdir -p /mnt /run /var
ln -s /run /var/run
mount -t tmpfs run /run
mount -t ext4 /dev/vda /mnt
/usr/sbin/qemu-ga -m virtio-serial -p /dev/vport0p1 -t /run -F/etc/rempart/fsfreeze-hook >/run/agent.log 2>&1 &
echo \"agent is started\"
n=0
while :; do
  n=$((n+1))
  echo $n >/mnt/file-$((n % 50))
  [ $((n % 10)) = 0 ] && { sync; echo \"wrote $n\"; }
done
";
const TEST_HOOK: &str = "#!/bin/sh
blockdev --flushbufs /dev/vdb
order=$(head -c 64 /dev/vdb | tr -d '\\0' | head -n 1)
case $1 in
  freeze)
    [ \"$order\" = slow ] && sleep 4
    [ \"$order\" = fail ] && exit 3
    echo prepared >/mnt/marker ;;
  thaw) rm -f /mnt/marker ;;
esac
";

/// Runs the words after `run=` on the kernel's command line, `%` for a space.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
export PATH=/bin
for m in $(cat /modules); do insmod /$m.ko || echo \"insmod $m failed\"; done
echo \"guest is up\"
run=$(sed -n 's/.*run=\\([^ ]*\\).*/\\1/p' /proc/cmdline | tr % ' ')
eval \"$run\"
while :; do sleep 1000; done
";

/// Loops that the tests run in the guest.
pub mod run {
    /// Numbered, flushed writes; says each, or its failure.
    pub const WRITER: &str = "n=0;while%:;do%n=$((n+1));if%echo%$n|dd%of=/dev/vda%bs=512%seek=$n%conv=notrunc,fsync%2>/dev/null;then%echo%wrote%$n;else%echo%failed%$n;fi;done";
    /// The same, and the disk's size in sectors after each.
    pub const MEASURING_WRITER: &str = "n=0;while%:;do%n=$((n+1));if%echo%$n|dd%of=/dev/vda%bs=512%seek=$n%conv=notrunc,fsync%2>/dev/null;then%echo%wrote%$n;else%echo%failed%$n;fi;echo%sees%vda%$(cat%/sys/block/vda/size);done";
    pub const POWEROFF: &str = "poweroff%-f";
    /// Counts in memory, in a file on the first disk that it never flushes, and on the second disk, flushed each time: there
    /// each number gets a page of its own, behind [`super::NUMBERS_FROM`]. Says each number, and what the file held.
    pub const COUNTER: &str = "mount%-t%ext4%/dev/vda%/tmp;n=0;echo%$n>/tmp/n;while%:;do%n=$((n+1));read%was</tmp/n;echo%counted%$n%of%$was.;echo%$n>/tmp/n;dd%if=/tmp/n%of=/dev/vdb%bs=4k%seek=$((256+n))%conv=sync,fsync%2>/dev/null;done";
    /// Ten datagrams a second to the bridge.
    pub const TALKER: &str = "ip%link%set%eth0%up;ip%addr%add%10.99.0.2/24%dev%eth0;syslogd%-R%10.99.0.1:7000;while%:;do%logger%hello;usleep%100000;done";
}

/// Page of the second disk. Of a page that is written, all is: two numbers in one would hide each other.
const NUMBERS_FROM: usize = 256;
const PAGE: usize = 4096;
/// Far above what a guest takes to boot.
const PATIENCE: Duration = Duration::from_secs(150);

/// The numbers that a [`run::COUNTER`] said in whole, and what it found.
pub fn counted(console: &Path) -> Vec<(u64, String)> {
    let text = String::from_utf8_lossy(&std::fs::read(console).unwrap_or_default()).into_owned();
    let numbers = text.lines().filter_map(|line| {
        let (number, found) = line.trim().strip_suffix('.')?.strip_prefix("counted ")?.split_once(' ')?;
        Some((number.parse().ok()?, found.to_owned()))
    });
    numbers.collect()
}

/// Waits until a guest has said so many numbers more, whole ones; returns the last.
pub fn counts_on(console: &Path, more: usize) -> u64 {
    let (before, end) = (counted(console).len(), Instant::now() + PATIENCE);
    loop {
        let said = counted(console);
        if said.len() >= before + more {
            return said.last().unwrap().0;
        }
        assert!(Instant::now() < end, "the guest does not count on: {:?}", said.last());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// That it said each number once, and that its file always held the one before.
pub fn never_went_back(console: &Path) {
    let said = counted(console);
    let odd: Vec<_> = said.iter().filter(|(number, found)| *found != format!("of {}", number - 1)).collect();
    assert!(odd.is_empty(), "{odd:?} of {said:?}");
    assert!(said.windows(2).all(|pair| pair[1].0 == pair[0].0 + 1), "{said:?}");
}

/// The numbers on the second disk's image.
pub fn numbers_on(image: &Path) -> Vec<u64> {
    let content = std::fs::read(image).unwrap();
    let pages = content.chunks(PAGE).enumerate().skip(NUMBERS_FROM);
    let numbers = pages.filter_map(|(page, content)| {
        let text = content.split(|byte| *byte == 0).next().filter(|text| !text.is_empty())?;
        let number: u64 = std::str::from_utf8(text).unwrap().trim().parse().unwrap();
        assert_eq!(number as usize, page - NUMBERS_FROM);
        Some(number)
    });
    numbers.collect()
}

/// Takes the numbers off the image, before its guest is resumed: what is there afterwards was written since. Returns the last.
pub fn take_numbers_off(image: &Path) -> u64 {
    let numbers = numbers_on(image);
    assert!(numbers.iter().copied().eq(1..=numbers.len() as u64), "{numbers:?}");
    let (mut file, zeroes) =
        (std::fs::OpenOptions::new().write(true).open(image).unwrap(), vec![0; numbers.len() * PAGE]);
    file.seek(SeekFrom::Start(((NUMBERS_FROM + 1) * PAGE) as u64)).unwrap();
    file.write_all(&zeroes).unwrap();
    numbers.len() as u64
}

/// That the memory of a guest that was resumed is of one moment with its disk, which held `last` then: the first number that
/// it writes is the next. Disks from later are ahead of it, disks from earlier behind.
pub fn went_on_from(last: u64, image: &Path) {
    let written = numbers_on(image);
    assert!(
        !written.is_empty() && written.iter().copied().eq(last + 1..=last + written.len() as u64),
        "the disk is of {last}, memory writes {written:?}"
    );
}

pub struct Guest {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Guest {
    /// QEMU's options that boot it with `run`.
    pub fn options(run: &str) -> Vec<String> {
        static GUEST: OnceLock<Guest> = OnceLock::new();
        GUEST.get_or_init(|| Guest::make(false)).boot(run)
    }

    /// QEMU's options that boot it with Debian's guest agent, which listens on `socket`. Its first disk is an ext4 file
    /// system, its second one tells the hook what to do.
    pub fn options_with_agent(socket: &Path) -> Vec<String> {
        let mut options = Self::options_for_agent();
        let channel = format!("socket,id=agent,path={},server=on,wait=off", socket.display());
        let devices = ["virtio-serial-pci", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"];
        options.extend(["-chardev".into(), channel]);
        options.extend(devices.into_iter().flat_map(|device| ["-device".to_owned(), device.to_owned()]));
        options
    }

    /// The same where the machine has the agent's channel.
    pub fn options_for_agent() -> Vec<String> {
        static GUEST: OnceLock<Guest> = OnceLock::new();
        GUEST.get_or_init(|| Guest::make(true)).boot("/agent")
    }

    fn boot(&self, run: &str) -> Vec<String> {
        let append = format!(
            "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check mitigations=off random.trust_cpu=on run={run}"
        );
        [
            "-kernel",
            self.kernel.to_str().unwrap(),
            "-initrd",
            self.initramfs.to_str().unwrap(),
            "-append",
            &append,
        ]
        .map(str::to_owned)
        .to_vec()
    }

    fn make(with_agent: bool) -> Self {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest");
        let unpacked = dir.join("kernel");
        std::fs::create_dir_all(&dir).unwrap();
        // Each test is a process of its own, and two of them may be the first.
        let lock = std::fs::File::create(dir.join("lock")).unwrap();
        lock.lock().unwrap();
        if !unpacked.exists() {
            let script = "p=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-/{print $2; exit}')
                apt-get download -q $p && rm -rf kernel.new && dpkg -x $p*.deb kernel.new && mv kernel.new kernel";
            let done = Command::new("sh").args(["-ec", script]).current_dir(&dir).output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        }
        let agent = dir.join("agent");
        if with_agent && !agent.exists() {
            let script = "apt-get download -q qemu-guest-agent && rm -rf agent.new &&
                dpkg -x qemu-guest-agent_*.deb agent.new && mv agent.new agent";
            let done = Command::new("sh").args(["-ec", script]).current_dir(&dir).output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        }
        drop(lock);
        let kernel = only_entry(&unpacked.join("boot"), "vmlinuz-");
        let modules = only_entry(&unpacked.join("lib/modules"), "");
        let (draft, initramfs) = (
            dir.join(format!("initramfs-{}", std::process::id())),
            dir.join(if with_agent { "initramfs-agent" } else { "initramfs" }),
        );
        let mut archive = Archive::default();
        archive.add("bin", 0o040_755, &[]);
        archive.add("bin/busybox", 0o100_755, &std::fs::read("/bin/busybox").unwrap());
        archive.add("init", 0o100_755, INIT.as_bytes());
        let names: Vec<&str> = MODULES.into_iter().chain(with_agent.then_some(AGENT_MODULE)).collect();
        archive.add("modules", 0o100_644, names.join(" ").as_bytes());
        if with_agent {
            archive.add_agent(&agent.join("usr/sbin/qemu-ga"));
        }
        for module in names {
            let file =
                find(&modules, &format!("{module}.ko")).unwrap_or_else(|| panic!("no module {module}"));
            archive.add(&format!("{module}.ko"), 0o100_644, &std::fs::read(file).unwrap());
        }
        std::fs::write(&draft, archive.finish()).unwrap();
        std::fs::rename(draft, &initramfs).unwrap();
        Self { kernel, initramfs }
    }
}

fn only_entry(dir: &Path, prefix: &str) -> PathBuf {
    let mut entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.find(|entry| entry.file_name().to_str().unwrap().starts_with(prefix)).unwrap().path()
}

fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    std::fs::read_dir(dir).ok()?.map(|entry| entry.unwrap()).find_map(|entry| {
        if entry.file_type().unwrap().is_dir() {
            find(&entry.path(), name)
        } else {
            (entry.file_name() == name).then(|| entry.path())
        }
    })
}

/// A cpio archive in the kernel's `newc` format (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, contents: &[u8]) {
        self.entries += 1;
        let fields =
            [self.entries, mode, 0, 0, 1, 0, contents.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend(b"070701");
        fields.iter().for_each(|field| self.bytes.extend(format!("{field:08x}").as_bytes()));
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    /// With the libraries it needs, and the hook that we ship.
    fn add_agent(&mut self, program: &Path) {
        let hook = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/guest/fsfreeze-hook");
        let output = Command::new("ldd").arg(program).output().unwrap();
        let listed = String::from_utf8(output.stdout).unwrap();
        // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`
        let libraries = listed.split_whitespace().filter(|word| word.starts_with('/'));
        let mut files: Vec<(String, PathBuf)> =
            libraries.map(|path| (path[1..].to_owned(), PathBuf::from(path))).collect();
        files.push(("usr/sbin/qemu-ga".into(), program.to_owned()));
        files.push(("etc/rempart/fsfreeze-hook".into(), hook));
        let folders = ["lib", "lib64", "lib/x86_64-linux-gnu", "usr", "usr/sbin", "etc", "etc/rempart"];
        for folder in folders.into_iter().chain(["etc/rempart/fsfreeze-hook.d"]) {
            self.add(folder, 0o040_755, &[]);
        }
        for (name, path) in files {
            self.add(&name, 0o100_755, &std::fs::read(path).unwrap());
        }
        self.add("agent", 0o100_755, AGENT.as_bytes());
        self.add("etc/rempart/fsfreeze-hook.d/50-test", 0o100_755, TEST_HOOK.as_bytes());
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}
