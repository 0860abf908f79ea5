//! The guest's two disks.
//!
//! Boot disk, an ordinary BIOS disk:
//!
//! | from | what |
//! |---|---|
//! | sector 0 | master boot record: SYSLINUX's boot code, partition table |
//! | 1 MiB | partition 1, active, FAT16: SYSLINUX, kernel, initramfs |
//! | 32 MiB | partition 2: the ring of records |
//!
//! Data disk: the ring of records from byte 0, and behind it bytes that never change, so that a resync of everything
//! and a resync of what changed can be told apart; or, where backups are tested, a plan by which the guest writes there.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use lab_guest::plan::{PLAN_BYTES, Plan};

use crate::setup::Kernel;

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
const FAT_AT: u64 = MIB;
/// Where the ring of records begins on the boot disk; on the data disk it begins at 0.
pub const RECORDS_AT: u64 = 32 * MIB;
/// Room for 73,728 records: no lap is completed in any scenario, so every record ever acknowledged can be checked.
const RECORDS_BYTES: u64 = 288 * MIB;
pub const BOOT_DISK_BYTES: u64 = RECORDS_AT + RECORDS_BYTES;
/// Where the ring ends on the data disk.
pub const RING_END: u64 = RECORDS_BYTES;
/// Constant bytes at the end of the data disk.
const CONSTANT_BYTES: u64 = 48 * MIB;
pub const DATA_DISK_BYTES: u64 = RECORDS_BYTES + CONSTANT_BYTES;

const SYSLINUX_MBR: &str = "/usr/lib/SYSLINUX/mbr.bin";
const TYPE_FAT16_LBA: u8 = 0x0E;
const TYPE_NOT_A_FILE_SYSTEM: u8 = 0xDA;

pub fn build_boot_disk(path: &Path, kernel: &Kernel, initramfs: &[u8], command_line: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let image = File::create(path).with_context(|| format!("create {}", path.display()))?;
    image.set_len(BOOT_DISK_BYTES)?;
    image.write_all_at(&master_boot_record()?, 0)?;
    drop(image);

    let mut format = Command::new("mkfs.fat");
    format.args(["-F", "16", "-n", "LAB", "--offset"]).arg((FAT_AT / SECTOR).to_string());
    format.args(["-h", &(FAT_AT / SECTOR).to_string()]).arg(path);
    format.arg(((RECORDS_AT - FAT_AT) / 1024).to_string());
    quietly(&mut format)?;
    quietly(Command::new("syslinux").args(["--install", "--offset", &FAT_AT.to_string()]).arg(path))?;

    let folder = path.with_extension("files");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("initrd.gz"), initramfs)?;
    let config =
        format!("DEFAULT lab\nLABEL lab\n  KERNEL vmlinuz\n  INITRD initrd.gz\n  APPEND {command_line}\n");
    fs::write(folder.join("syslinux.cfg"), config)?;
    fs::copy(&kernel.image, folder.join("vmlinuz"))?;
    let mut copy = Command::new("mcopy");
    copy.arg("-i").arg(format!("{}@@{FAT_AT}", path.display()));
    copy.args(["vmlinuz", "initrd.gz", "syslinux.cfg"].map(|name| folder.join(name))).arg("::");
    copy.env("MTOOLS_SKIP_CHECK", "1");
    quietly(&mut copy)?;
    fs::remove_dir_all(folder)?;
    Ok(())
}

fn quietly(command: &mut Command) -> Result<()> {
    crate::workspace::output(command).map(drop)
}

fn master_boot_record() -> Result<[u8; SECTOR as usize]> {
    let code = fs::read(SYSLINUX_MBR).with_context(|| format!("read {SYSLINUX_MBR}"))?;
    if code.len() > 440 {
        bail!("{SYSLINUX_MBR} is {} bytes long, 440 fit", code.len());
    }
    let mut sector = [0; SECTOR as usize];
    sector[..code.len()].copy_from_slice(&code);
    sector[440..444].copy_from_slice(b"RLAB");
    let partitions = [
        (0x80, TYPE_FAT16_LBA, FAT_AT, RECORDS_AT),
        (0x00, TYPE_NOT_A_FILE_SYSTEM, RECORDS_AT, BOOT_DISK_BYTES),
    ];
    for (index, (flags, kind, from, to)) in partitions.into_iter().enumerate() {
        let entry = &mut sector[446 + 16 * index..][..16];
        entry[0] = flags;
        entry[4] = kind;
        // No cylinders, heads and sectors: these values mean "use the sector numbers that follow".
        entry[1..4].copy_from_slice(&[0xFE, 0xFF, 0xFF]);
        entry[5..8].copy_from_slice(&[0xFE, 0xFF, 0xFF]);
        entry[8..12].copy_from_slice(&((from / SECTOR) as u32).to_le_bytes());
        entry[12..16].copy_from_slice(&(((to - from) / SECTOR) as u32).to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xAA]);
    Ok(sector)
}

pub fn build_data_disk(path: &Path) -> Result<()> {
    let mut image = File::create(path).with_context(|| format!("create {}", path.display()))?;
    image.set_len(DATA_DISK_BYTES)?;
    image.seek(SeekFrom::Start(RECORDS_BYTES))?;
    let mut block = vec![0u8; MIB as usize];
    let mut state = 0x243F_6A88_85A3_08D3u64;
    for _ in 0..CONSTANT_BYTES / MIB {
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        image.write_all(&block)?;
    }
    Ok(())
}

/// Has the guest write all over what is constant else.
pub fn scatter(data_disk: &Path, seed: u64) -> Result<()> {
    let image = File::options().write(true).open(data_disk)?;
    let mut sector = [0; PLAN_BYTES];
    Plan { seed, life: 0 }.encode(&mut sector);
    Ok(image.write_all_at(&sector, RING_END)?)
}

/// Copies a file and leaves out its zeroes.
pub fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    let mut source = File::open(from).with_context(|| format!("open {}", from.display()))?;
    let target = File::create(to).with_context(|| format!("create {}", to.display()))?;
    target.set_len(source.metadata()?.len())?;
    let mut block = vec![0u8; 64 << 10];
    let mut at = 0;
    loop {
        let length = source.read(&mut block)?;
        if length == 0 {
            return Ok(());
        }
        if block[..length].iter().any(|byte| *byte != 0) {
            target.write_all_at(&block[..length], at)?;
        }
        at += length as u64;
    }
}
