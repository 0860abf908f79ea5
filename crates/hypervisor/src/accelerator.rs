//! Whether KVM really runs a guest here.
//!
//! `/dev/kvm` may open and its guests still not run (nested hosts, half of a processor's features), so the only
//! test that counts is a guest that ran: the BIOS, and a boot sector that switches to 64-bit mode with paging, uses
//! SSE and POPCNT, and says so by QEMU's exit status.

use crate::command_line::cpu_option;
use crate::definition::CpuModel;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

/// It takes half a second under emulation, less under KVM.
const DEADLINE: Duration = Duration::from_secs(10);

/// What the guest writes to its exit port comes back as twice that and one.
const RAN: i32 = (0x31 << 1) | 1;

/// A disk of less has no cylinder, and the BIOS does not boot from it.
const DISK_SIZE: u64 = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    Kvm,
    /// Emulation: correct, and many times slower.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// What to run guests with, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    pub accelerator: Accelerator,
    /// For people: `a guest ran under KVM`, or what went wrong.
    pub reason: String,
}

/// Starts a guest with `model` under KVM. Takes at most ten seconds, usually a fraction of one.
pub async fn probe(qemu_program: &Path, model: &CpuModel) -> Probe {
    match run_guest(qemu_program, model, Accelerator::Kvm).await {
        Ok(Ran::ToItsEnd) => Probe { accelerator: Accelerator::Kvm, reason: "a guest ran under KVM".into() },
        Ok(Ran::UntilReset) => {
            Probe { accelerator: Accelerator::Tcg, reason: "a guest under KVM was reset".into() }
        }
        Err(reason) => Probe { accelerator: Accelerator::Tcg, reason },
    }
}

/// How far the test guest got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ran {
    ToItsEnd,
    /// QEMU gave it its processor, which lacks an instruction that the guest tries.
    UntilReset,
}

/// Runs the test guest; the error says why QEMU did not.
pub(crate) async fn run_guest(
    qemu_program: &Path,
    model: &CpuModel,
    accelerator: Accelerator,
) -> Result<Ran, String> {
    if accelerator == Accelerator::Kvm && !Path::new("/dev/kvm").exists() {
        return Err("there is no /dev/kvm".into());
    }
    let disk = boot_disk().map_err(|error| format!("the test guest's disk: {error}"))?;
    let output = Command::new(qemu_program)
        .args(["-nodefaults", "-no-user-config", "-machine", "q35", "-m", "64M", "-display", "none"])
        .args(["-accel", &accelerator.to_string(), "-cpu", &cpu_option(model, accelerator)])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-no-reboot"])
        .args(["-blockdev", "driver=file,node-name=disk,filename=/proc/self/fd/0,read-only=on,locking=off"])
        .args(["-device", "virtio-blk-pci,drive=disk"])
        .stdin(Stdio::from(disk))
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(DEADLINE, output).await {
        Err(_) => Err(format!("a guest under {accelerator} did nothing for {} s", DEADLINE.as_secs())),
        Ok(Err(error)) => Err(format!("`{}` does not start: {error}", qemu_program.display())),
        Ok(Ok(output)) if output.status.code() == Some(RAN) => Ok(Ran::ToItsEnd),
        Ok(Ok(output)) if output.status.success() => Ok(Ran::UntilReset),
        Ok(Ok(output)) => {
            let errors = String::from_utf8_lossy(&output.stderr);
            // The last line is the verdict; the ones before may be warnings.
            let last = errors.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("QEMU ended early");
            Err(format!("a guest under {accelerator} does not run: {last}"))
        }
    }
}

/// The boot sector. As GNU assembler:
///
/// ```text
///     cli; xorw %ax,%ax; movw %ax,%ds; movw %ax,%ss; movw $0x7c00,%sp
///     movw $0x1000,%di; movw %ax,%es; xorl %eax,%eax; movw $0x0c00,%cx; cld; rep stosl
///     movl $0x2003,0x1000; movl $0x3003,0x2000; movl $0x0083,0x3000     # the first 2 MiB as they are
///     lgdtl gdtp; movl $0x1000,%eax; movl %eax,%cr3
///     movl $0x620,%eax; movl %eax,%cr4                                  # PAE, SSE
///     movl $0xc0000080,%ecx; rdmsr; orl $0x100,%eax; wrmsr              # EFER.LME
///     movl $0x80000001,%eax; movl %eax,%cr0; ljmpl $8,$long             # paging, protection
/// long: # 64-bit
///     movl $0x1234567,%eax; movq %rax,%xmm0; popcntq %rax,%rax
///     addb $0x25,%al; outb %al,$0xf4                                    # 12 bits + 0x25 = 0x31
/// 1:  hlt; jmp 1b
/// gdt: .quad 0, 0x00209a0000000000
/// gdtp: .word 15; .long gdt
/// ```
const BOOT_SECTOR: [u8; 156] = *b"\
    \xfa\x31\xc0\x8e\xd8\x8e\xd0\xbc\x00\x7c\xbf\x00\x10\x8e\xc0\x66\x31\xc0\xb9\x00\x0c\xfc\x66\xf3\xab\x66\
    \xc7\x06\x00\x10\x03\x20\x00\x00\x66\xc7\x06\x00\x20\x03\x30\x00\x00\x66\xc7\x06\x00\x30\x83\x00\x00\x00\
    \x66\x0f\x01\x16\x98\x7c\x66\xb8\x00\x10\x00\x00\x0f\x22\xd8\x66\xb8\x20\x06\x00\x00\x0f\x22\xe0\x66\xb9\
    \x80\x00\x00\xc0\x0f\x32\x66\x0d\x00\x01\x00\x00\x0f\x30\x66\xb8\x01\x00\x00\x80\x0f\x22\xc0\x66\xea\x6d\
    \x7c\x00\x00\x08\x00\xb8\x67\x45\x23\x01\x66\x48\x0f\x6e\xc0\xf3\x48\x0f\xb8\xc0\x04\x25\xe6\xf4\xf4\xeb\
    \xfd\x0f\x1f\x44\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x9a\x20\x00\x0f\x00\x88\x7c";

/// The disk in memory.
fn boot_disk() -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::from(rustix::fs::memfd_create("boot-sector", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.set_len(DISK_SIZE)?;
    file.write_all_at(&BOOT_SECTOR, 0)?;
    file.write_all_at(&[0x55, 0xaa], 510)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_guest_that_runs_is_seen_to_run() {
        let ran = run_guest(Path::new("qemu-system-x86_64"), &CpuModel::Baseline, Accelerator::Tcg).await;
        assert_eq!(ran, Ok(Ran::ToItsEnd));
    }

    /// It has no POPCNT, which the test guest tries; a guest of somebody's may do without.
    #[tokio::test]
    async fn a_small_processor_is_told_from_an_unknown_one() {
        let model = |name: &str| CpuModel::Named(name.into());
        let qemu = Path::new("qemu-system-x86_64");
        assert_eq!(run_guest(qemu, &model("qemu64"), Accelerator::Tcg).await, Ok(Ran::UntilReset));
        run_guest(qemu, &model("no-such-model"), Accelerator::Tcg).await.unwrap_err();
    }

    #[tokio::test]
    async fn the_probe_gives_a_reason_for_its_choice() {
        let probe = probe(Path::new("qemu-system-x86_64"), &CpuModel::Baseline).await;
        match probe.accelerator {
            Accelerator::Kvm => assert_eq!(probe.reason, "a guest ran under KVM"),
            Accelerator::Tcg => assert!(probe.reason.contains("kvm"), "{}", probe.reason),
        }
    }

    #[tokio::test]
    async fn a_missing_qemu_is_said() {
        let reason =
            run_guest(Path::new("/no/qemu"), &CpuModel::Baseline, Accelerator::Tcg).await.unwrap_err();
        assert!(reason.starts_with("`/no/qemu` does not start"), "{reason}");
    }
}
