//! A tiny Linux guest: a Debian kernel and busybox, made once and kept beside the build.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

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
    /// Ten datagrams a second to the bridge.
    pub const TALKER: &str = "ip%link%set%eth0%up;ip%addr%add%10.99.0.2/24%dev%eth0;syslogd%-R%10.99.0.1:7000;while%:;do%logger%hello;usleep%100000;done";
}

pub struct Guest {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Guest {
    /// QEMU's options that boot it with `run`.
    pub fn options(run: &str) -> Vec<String> {
        static GUEST: OnceLock<Guest> = OnceLock::new();
        let guest = GUEST.get_or_init(Guest::make);
        let append = format!(
            "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check mitigations=off random.trust_cpu=on run={run}"
        );
        [
            "-kernel",
            guest.kernel.to_str().unwrap(),
            "-initrd",
            guest.initramfs.to_str().unwrap(),
            "-append",
            &append,
        ]
        .map(str::to_owned)
        .to_vec()
    }

    fn make() -> Self {
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
        drop(lock);
        let kernel = only_entry(&unpacked.join("boot"), "vmlinuz-");
        let modules = only_entry(&unpacked.join("lib/modules"), "");
        let (draft, initramfs) =
            (dir.join(format!("initramfs-{}", std::process::id())), dir.join("initramfs"));
        let mut archive = Archive::default();
        archive.add("bin", 0o040_755, &[]);
        archive.add("bin/busybox", 0o100_755, &std::fs::read("/bin/busybox").unwrap());
        archive.add("init", 0o100_755, INIT.as_bytes());
        archive.add("modules", 0o100_644, MODULES.join(" ").as_bytes());
        for module in MODULES {
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

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}
