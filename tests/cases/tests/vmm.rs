//! `husk-vmm` alone: how a VM ends, and what it refuses. The guest half of most tests is a kernel of
//! a few instructions.

use std::fs::File;
use std::io::{Read, Write};

use anyhow::Result;
use husk_cases::kernel::{self, HALT};
use husk_cases::place;
use husk_cases::vmm::Vm;
use husk_proto::guest::{SIGNAL_PORT, signal};
use husk_vmm_api::{Exit, FdIndex, Phase, Request};

/// Runs `code` to the VM's end; returns the outcome and the process's exit code.
fn run(code: &[u8]) -> Result<(Exit, Option<i32>)> {
    let (exit, status) = Vm::new(kernel::of(code)?, 48)?.run()?;
    Ok((exit, status.code()))
}

#[test]
fn power_off_is_reported() -> Result<()> {
    assert_eq!(run(&kernel::out(SIGNAL_PORT, signal::POWER_OFF))?, (Exit::PowerOff, Some(0)));
    Ok(())
}

#[test]
fn a_reset_without_the_warm_flag_is_a_reboot() -> Result<()> {
    assert_eq!(run(&kernel::out(0x64, 0xfe))?, (Exit::Reboot, Some(10)));
    Ok(())
}

#[test]
fn a_reset_with_the_warm_flag_is_a_panic() -> Result<()> {
    // mov word [0x472], 0x1234
    let mut code = vec![0x66, 0xc7, 0x04, 0x25, 0x72, 0x04, 0x00, 0x00, 0x34, 0x12];
    code.extend(kernel::out(0x64, 0xfe));
    let (exit, code) = run(&code)?;
    assert!(matches!(exit, Exit::Panic { .. }), "{exit:?}");
    assert_eq!(code, Some(11));
    Ok(())
}

#[test]
fn a_triple_fault_is_reported() -> Result<()> {
    // ud2, with an interrupt table that has no entry for it, nor for what follows.
    let (exit, code) = run(&[0x0f, 0x0b])?;
    assert!(matches!(exit, Exit::TripleFault { .. }), "{exit:?}");
    assert_eq!(code, Some(12));
    Ok(())
}

#[test]
fn phases_come_in_their_order() -> Result<()> {
    let mut code = kernel::out(SIGNAL_PORT, signal::INIT);
    code.extend(kernel::out(SIGNAL_PORT, signal::READY));
    code.extend(HALT);
    let mut vm = Vm::new(kernel::of(&code)?, 48)?.start()?;
    vm.wait_for(Phase::AgentReady)?;
    use Phase::*;
    let expected = [VmmStarted, Kvm, Memory, Load, Devices, FirstInstruction, Init, AgentReady];
    assert_eq!(vm.phases(), expected);
    let counters = vm.counters()?;
    assert_eq!(counters.io_exits_at_agent_ready, Some(2));
    assert_eq!(counters.exits["io_out"], 2);
    assert!(counters.phases_ns.values().is_sorted());
    Ok(())
}

#[test]
fn stop_ends_a_guest_that_does_nothing() -> Result<()> {
    let mut vm = Vm::new(kernel::of(&HALT)?, 48)?.start()?;
    vm.wait_for(Phase::FirstInstruction)?;
    vm.send(&Request::Stop, &[])?;
    let (exit, status) = vm.wait()?;
    assert_eq!((exit, status.code()), (Exit::Stopped, Some(0)));
    Ok(())
}

#[test]
fn a_guest_that_touches_every_register_of_a_device_hurts_nobody() -> Result<()> {
    // Writes and reads 32 bits at each multiple of 4 in the first four windows, then powers off.
    //   mov rdi, 0xd0000000 ; loop: mov dword [rdi], 0xffffffff ; mov eax, [rdi] ; add rdi, 4
    //   cmp rdi, 0xd0004000 (in rsi) ; jb loop
    let mut code = vec![0x48, 0xbf, 0, 0, 0, 0xd0, 0, 0, 0, 0];
    code.extend([0x48, 0xbe, 0, 0x40, 0, 0xd0, 0, 0, 0, 0]);
    // Page tables map the first GiB only: map the fourth GiB by a second entry of the PDPT. That
    // entry's directory is the first one's, at 0xb000, whose pages are rewritten to 0xc0000000 up.
    let map = map_fourth_gib();
    let touch = [
        0xc7, 0x07, 0xff, 0xff, 0xff, 0xff, // mov dword [rdi], -1
        0x8b, 0x07, // mov eax, [rdi]
        0x48, 0x83, 0xc7, 0x04, // add rdi, 4
        0x48, 0x39, 0xf7, // cmp rdi, rsi
        0x72, 0xef, // jb touch
    ];
    let mut all = map;
    all.extend(code);
    all.extend(touch);
    all.extend(kernel::out(SIGNAL_PORT, signal::POWER_OFF));
    assert_eq!(run(&all)?, (Exit::PowerOff, Some(0)));
    Ok(())
}

/// Adds an entry to the PDPT (0xa000) that maps 3 GiB..4 GiB as one page of 1 GiB.
fn map_fourth_gib() -> Vec<u8> {
    // mov rax, 0xc0000083 ; mov [0xa018], rax
    let mut code = vec![0x48, 0xb8, 0x83, 0, 0, 0xc0, 0, 0, 0, 0];
    code.extend([0x48, 0x89, 0x04, 0x25, 0x18, 0xa0, 0, 0]);
    code
}

#[test]
fn a_bad_configuration_is_refused_by_name() -> Result<()> {
    type Spoil = fn(&mut Vm);
    let cases: [(Spoil, &str); 4] = [
        (|vm| vm.config.vcpus = 0, "vcpus is 0, accepted are 1 to 64"),
        (|vm| vm.config.memory_mib = 8, "memory_mib is 8, accepted are 48"),
        (|vm| vm.config.kernel = FdIndex(7), "the kernel did not come"),
        (|vm| vm.config.cmdline = "x".repeat(3000), "kernel command line of"),
    ];
    for (spoil, expected) in cases {
        let mut vm = Vm::new(kernel::of(&HALT)?, 48)?;
        spoil(&mut vm);
        let (exit, status) = vm.run()?;
        let Exit::Error { message, .. } = exit else { panic!("{exit:?}") };
        assert!(message.contains(expected), "{message}");
        assert_eq!(status.code(), Some(1));
    }
    Ok(())
}

#[test]
fn a_kernel_that_is_none_is_refused() -> Result<()> {
    let mut script = tempfile::tempfile()?;
    script.write_all(&[b'#'; 4096])?;
    let (exit, _) = Vm::new(script, 48)?.run()?;
    let Exit::Error { message, .. } = exit else { panic!("{exit:?}") };
    assert!(message.contains("ELF magic"), "{message}");

    let mut truncated = tempfile::tempfile()?;
    std::io::copy(&mut File::open(place::kernel())?.take(1 << 20), &mut truncated)?;
    let (exit, _) = Vm::new(truncated, 128)?.run()?;
    let Exit::Error { message, .. } = exit else { panic!("{exit:?}") };
    assert!(message.contains("truncated"), "{message}");
    Ok(())
}

#[test]
fn a_descriptor_that_is_not_kvm_is_refused() -> Result<()> {
    let mut vm = Vm::new(kernel::of(&HALT)?, 48)?;
    vm.config.kvm = FdIndex(1);
    vm.config.kernel = FdIndex(0);
    let (exit, _) = vm.run()?;
    assert!(matches!(exit, Exit::Error { .. }), "{exit:?}");
    Ok(())
}

#[test]
fn the_agent_comes_up_with_one_and_with_many_cpus() -> Result<()> {
    for vcpus in [1, 2, 8] {
        let mut vm = Vm::with_agent(256)?;
        vm.config.vcpus = vcpus;
        let mut vm = vm.start()?;
        vm.wait_for(Phase::AgentReady)?;
        vm.wait_for_control()?;
    }
    Ok(())
}

#[test]
fn the_agent_powers_off_when_the_pods_process_lets_go() -> Result<()> {
    let mut vm = Vm::with_agent(128)?.start()?;
    drop(vm.wait_for_control()?);
    let (exit, _) = vm.wait()?;
    assert_eq!(exit, Exit::PowerOff);
    Ok(())
}
