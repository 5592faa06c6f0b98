//! The device cgroup: a small BPF program, made from rules, that the kernel asks about every open
//! and mknod of a device by a container's processes.

use std::os::fd::BorrowedFd;

use crate::container::spec::{DeviceRule, SpecError};
use crate::sys;

/// A rule, understood. `None` matches every number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rule {
    allow: bool,
    /// Block or character device; None for both.
    kind: Option<u16>,
    major: Option<i32>,
    minor: Option<i32>,
    /// Some of [`MKNOD`], [`READ`], [`WRITE`].
    access: u16,
}

/// `BPF_DEVCG_DEV_*` and `BPF_DEVCG_ACC_*` of linux/bpf.h.
const BLOCK: u16 = 1;
const CHARACTER: u16 = 2;
const MKNOD: u16 = 1;
const READ: u16 = 2;
const WRITE: u16 = 4;
const ALL: u16 = MKNOD | READ | WRITE;

/// Most rules of one container: 16 instructions each must stay below the 4096 of a BPF program.
const MAX_RULES: usize = 250;

/// What every container may use, whatever its rules say, as runc allows it: make any node, and use
/// null, zero, full, random, urandom, tty, console, ptmx and the pseudo-terminals.
const ALWAYS: [Rule; 11] = [
    Rule { allow: true, kind: Some(CHARACTER), major: None, minor: None, access: MKNOD },
    Rule { allow: true, kind: Some(BLOCK), major: None, minor: None, access: MKNOD },
    character(1, Some(3)),
    character(1, Some(8)),
    character(1, Some(7)),
    character(1, Some(9)),
    character(1, Some(5)),
    character(5, Some(0)),
    character(5, Some(1)),
    character(5, Some(2)),
    character(136, None),
];

const fn character(major: i32, minor: Option<i32>) -> Rule {
    Rule { allow: true, kind: Some(CHARACTER), major: Some(major), minor, access: ALL }
}

/// Understands `linux.resources.devices`, and adds what every container may use.
///
/// # Errors
/// [`SpecError::Invalid`] naming the field.
pub(crate) fn rules(given: &[DeviceRule]) -> Result<Vec<Rule>, SpecError> {
    if given.len() > MAX_RULES {
        let count = given.len().to_string();
        return Err(SpecError::invalid("linux.resources.devices", count, "at most 250 rules"));
    }
    let mut all = Vec::with_capacity(given.len() + ALWAYS.len());
    for (index, rule) in given.iter().enumerate() {
        let field = |name: &str| format!("linux.resources.devices[{index}].{name}");
        let number = |name: &str, value: Option<i64>| match value {
            None | Some(-1) => Ok(None),
            Some(v) => i32::try_from(v).ok().filter(|v| *v >= 0).map(Some).ok_or_else(|| {
                SpecError::invalid(field(name), v.to_string(), "must be a device number or -1")
            }),
        };
        let kind = match rule.kind.as_deref() {
            None | Some("" | "a") => None,
            Some("b") => Some(BLOCK),
            Some("c" | "u") => Some(CHARACTER),
            Some(other) => {
                return Err(SpecError::invalid(field("type"), other, "must be a, b, c or u"));
            }
        };
        let mut access = 0;
        for letter in rule.access.as_deref().filter(|a| !a.is_empty()).unwrap_or("rwm").chars() {
            access |= match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => {
                    let given = rule.access.clone().unwrap_or_default();
                    return Err(SpecError::invalid(field("access"), given, "must be of r, w, m"));
                }
            };
        }
        all.push(Rule {
            allow: rule.allow,
            kind,
            major: number("major", rule.major)?,
            minor: number("minor", rule.minor)?,
            access,
        });
    }
    all.extend(ALWAYS);
    Ok(all)
}

/// Allows a disk to be read; if it is to be more than read, also to be written, and nodes of it to be
/// made.
pub(crate) fn disk(device: rustix::fs::Dev, read_only: bool) -> Rule {
    let access = if read_only { READ } else { ALL };
    // The program compares 32 bits as they are; numbers of devices have at most 20.
    let major = Some(rustix::fs::major(device).cast_signed());
    let minor = Some(rustix::fs::minor(device).cast_signed());
    Rule { allow: true, kind: Some(BLOCK), major, minor, access }
}

/// One instruction of eBPF, in the layout of `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Operation codes that are used here (linux/bpf_common.h, linux/bpf.h).
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const MOVE_REGISTER: u8 = 0xbc; // BPF_ALU | BPF_MOV | BPF_X
const MOVE: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const AND: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const SHIFT_RIGHT: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const JUMP_EQUAL: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_NOT_EQUAL: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const JUMP_NOT_EQUAL_REGISTER: u8 = 0x5d; // BPF_JMP | BPF_JNE | BPF_X
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

/// Registers: the answer, the context and scratch, and what was asked.
const ANSWER: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: to | (from << 4), offset, immediate }
}

/// The program: the last rule that matches decides; if none does, access is denied. A rule allows a
/// request of which it covers every kind of access, and denies one of which it covers any.
pub(crate) fn program(rules: &[Rule]) -> Vec<Instruction> {
    // struct bpf_cgroup_dev_ctx { u32 access_type (access << 16 | kind), u32 major, u32 minor }
    let mut all = vec![
        instruction(LOAD_WORD, KIND, CONTEXT, 0, 0),
        instruction(MOVE_REGISTER, ACCESS, KIND, 0, 0),
        instruction(AND, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        all.extend(rule_program(rule));
        if rule.kind.is_none() && rule.major.is_none() && rule.minor.is_none() && rule.access == ALL
        {
            // It always decides: whatever came after it would be unreachable, which the kernel's
            // verifier refuses.
            return all;
        }
    }
    all.extend([instruction(MOVE, ANSWER, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)]);
    all
}

/// The part for one rule: falls through to the next if it does not match.
fn rule_program(rule: &Rule) -> Vec<Instruction> {
    let mut tests = Vec::new();
    if let Some(kind) = rule.kind {
        tests.push(instruction(JUMP_NOT_EQUAL, KIND, 0, 0, i32::from(kind)));
    }
    if rule.access != ALL {
        tests.push(instruction(MOVE_REGISTER, CONTEXT, ACCESS, 0, 0));
        tests.push(instruction(AND, CONTEXT, 0, 0, i32::from(rule.access)));
        tests.push(if rule.allow {
            instruction(JUMP_NOT_EQUAL_REGISTER, CONTEXT, ACCESS, 0, 0)
        } else {
            instruction(JUMP_EQUAL, CONTEXT, 0, 0, 0)
        });
    }
    if let Some(major) = rule.major {
        tests.push(instruction(JUMP_NOT_EQUAL, MAJOR, 0, 0, major));
    }
    if let Some(minor) = rule.minor {
        tests.push(instruction(JUMP_NOT_EQUAL, MINOR, 0, 0, minor));
    }
    let mut all = tests;
    all.push(instruction(MOVE, ANSWER, 0, 0, i32::from(rule.allow)));
    all.push(instruction(EXIT, 0, 0, 0, 0));
    // Every jump goes past the end of this part; offsets count from the instruction after the jump.
    let length = all.len();
    for (index, step) in all.iter_mut().enumerate() {
        if matches!(step.code, JUMP_EQUAL | JUMP_NOT_EQUAL | JUMP_NOT_EQUAL_REGISTER) {
            // At most 8 instructions: it always fits.
            step.offset = i16::try_from(length - index - 1).unwrap_or(i16::MAX);
        }
    }
    all
}

/// Puts the rules into force for a cgroup and all below it.
///
/// # Errors
/// What the kernel answers, e.g. `EINVAL` where it has no BPF.
pub(crate) fn attach(cgroup: BorrowedFd<'_>, rules: &[Rule]) -> std::io::Result<()> {
    sys::attach_device_program(cgroup, &program(rules))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Runs a program as the kernel would.
    fn run(program: &[Instruction], kind: u16, access: u16, major: i32, minor: i32) -> bool {
        let context = [(i32::from(access) << 16) | i32::from(kind), major, minor];
        let mut registers = [0_i64; 6];
        let mut at = 0;
        loop {
            let step = program[at];
            let (to, from) = (usize::from(step.registers & 15), usize::from(step.registers >> 4));
            at += 1;
            let immediate = i64::from(step.immediate);
            let mut jump = |taken: bool| {
                if taken {
                    at += usize::try_from(step.offset).unwrap();
                }
            };
            match step.code {
                LOAD_WORD => {
                    registers[to] = i64::from(context[usize::try_from(step.offset).unwrap() / 4]);
                }
                MOVE_REGISTER => registers[to] = registers[from],
                MOVE => registers[to] = immediate,
                AND => registers[to] &= immediate,
                SHIFT_RIGHT => registers[to] >>= immediate,
                JUMP_EQUAL => jump(registers[to] == immediate),
                JUMP_NOT_EQUAL => jump(registers[to] != immediate),
                JUMP_NOT_EQUAL_REGISTER => jump(registers[to] != registers[from]),
                EXIT => return registers[0] != 0,
                code => panic!("unknown instruction {code:#x}"),
            }
        }
    }

    fn rule(allow: bool, kind: &str, major: Option<i64>, access: &str) -> DeviceRule {
        DeviceRule {
            allow,
            kind: Some(kind.into()),
            major,
            minor: None,
            access: Some(access.into()),
        }
    }

    #[test]
    fn a_container_without_rules_reaches_null_but_no_disk() {
        for given in [vec![], vec![rule(false, "a", None, "rwm")]] {
            let program = program(&rules(&given).unwrap());
            assert!(run(&program, CHARACTER, READ | WRITE, 1, 3));
            assert!(run(&program, CHARACTER, READ | WRITE, 136, 7));
            assert!(run(&program, BLOCK, MKNOD, 254, 0));
            assert!(!run(&program, BLOCK, READ, 254, 0));
            assert!(!run(&program, CHARACTER, READ, 1, 1), "/dev/mem");
        }
    }

    #[test]
    fn a_container_reaches_the_disks_that_it_is_given_and_no_others() {
        let mut all = rules(&[rule(false, "a", None, "rwm")]).unwrap();
        let device = rustix::fs::makedev;
        all.extend([disk(device(254, 0), false), disk(device(254, 16), true)]);
        let program = program(&all);
        assert!(run(&program, BLOCK, READ | WRITE, 254, 0));
        assert!(run(&program, BLOCK, READ, 254, 16));
        for (access, minor) in [(WRITE, 16), (READ | WRITE, 16), (READ, 1), (READ, 32)] {
            assert!(!run(&program, BLOCK, access, 254, minor), "{access} {minor}");
        }
        assert!(!run(&program, BLOCK, READ, 253, 0));
        assert!(!run(&program, CHARACTER, READ, 254, 0));
    }

    #[test]
    fn a_privileged_container_reaches_everything() {
        let program = program(&rules(&[rule(true, "a", None, "rwm")]).unwrap());
        assert!(run(&program, BLOCK, READ | WRITE, 254, 0));
    }

    #[test]
    fn the_last_matching_rule_decides() {
        let given = [rule(true, "b", Some(8), "rw"), rule(false, "b", Some(8), "w")];
        let program = program(&rules(&given).unwrap());
        assert!(run(&program, BLOCK, READ, 8, 1));
        assert!(!run(&program, BLOCK, WRITE, 8, 1));
        assert!(!run(&program, BLOCK, READ | WRITE, 8, 1));
        assert!(!run(&program, BLOCK, READ, 9, 1));
    }

    #[test]
    fn impossible_rules_are_refused_by_name() {
        for bad in [
            rule(true, "x", None, "r"),
            rule(true, "c", Some(-2), "r"),
            rule(true, "c", None, "rx"),
        ] {
            let message = rules(&[bad]).unwrap_err().to_string();
            assert!(message.contains("linux.resources.devices[0]."), "{message}");
        }
        assert!(rules(&vec![rule(true, "a", None, "r"); MAX_RULES + 1]).is_err());
    }

    proptest! {
        #[test]
        fn every_program_ends_and_agrees_with_its_rules(
            given in prop::collection::vec(
                (any::<bool>(), 0..3_u16, -1..3_i32, -1..3_i32, 1..8_u16), 0..12),
            kind in 1..3_u16, access in 1..8_u16, major in 0..3_i32, minor in 0..3_i32,
        ) {
            let rules: Vec<Rule> = given.into_iter().map(|(allow, k, ma, mi, access)| Rule {
                allow,
                kind: (k != 0).then_some(k),
                major: (ma >= 0).then_some(ma),
                minor: (mi >= 0).then_some(mi),
                access,
            }).collect();
            let expected = rules.iter().rev().find(|r| {
                r.kind.is_none_or(|k| k == kind)
                    && r.major.is_none_or(|m| m == major)
                    && r.minor.is_none_or(|m| m == minor)
                    && if r.allow { access & r.access == access } else { access & r.access != 0 }
            }).is_some_and(|r| r.allow);
            let program = program(&rules);
            prop_assert!(program.len() < 4096);
            prop_assert_eq!(run(&program, kind, access, major, minor), expected);
        }
    }
}
