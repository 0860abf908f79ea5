//! What a machine shows before any system runs.

use crate::lab::{Lab, PATIENCE};
use rempart_hypervisor::Lease;
use rempart_hypervisor::definition::Firmware;
use tokio::io::AsyncReadExt;

#[tokio::test]
async fn a_uefi_machine_boots_its_firmware_and_keeps_its_variables() {
    let lab = Lab::new();
    let mut definition = lab.definition();
    definition.firmware = Firmware::Uefi;
    definition.memory_bytes = 128 << 20;
    let machine = lab.start_defined(definition.clone(), Lease::Unlimited).await;
    let mut console = machine.console().await.unwrap();
    let mut seen = Vec::new();
    let wait = async {
        while !String::from_utf8_lossy(&seen).contains("BdsDxe") {
            assert_ne!(console.read_buf(&mut seen).await.unwrap(), 0, "the console was closed");
        }
    };
    let boots = tokio::time::timeout(PATIENCE, wait).await;
    assert!(boots.is_ok(), "no firmware on the console");
    let variables = machine.nvram().await.unwrap().expect("a UEFI machine has variables");
    let factory = std::fs::read("/usr/share/OVMF/OVMF_VARS_4M.fd").unwrap();
    assert_eq!(variables.len(), factory.len());
    assert_ne!(variables, factory, "the firmware wrote none of its variables");
    machine.kill().await.unwrap();

    // On the other node, with the variables that travelled in the log.
    let other = Lab::new();
    let mut request = other.request(definition, Lease::Unlimited);
    request.nvram = Some(variables.clone());
    request.first_state = rempart_hypervisor::FirstState::Paused;
    let machine = rempart_hypervisor::Hypervisor::start(&other.qemu, request).await.unwrap();
    assert_eq!(machine.nvram().await.unwrap(), Some(variables));
    machine.kill().await.unwrap();
}

#[tokio::test]
async fn the_screen_is_seen() {
    let lab = Lab::new();
    let machine = lab.start(Lease::Unlimited).await;
    let picture = machine.screenshot().await.unwrap();
    assert!(picture.starts_with(b"\x89PNG\r\n\x1a\n"));
    assert_eq!(machine.nvram().await.unwrap(), None);
    machine.kill().await.unwrap();
}
