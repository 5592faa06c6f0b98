//! Where TCP connections to the loopback addresses of a network namespace go: to sockets of ours,
//! whatever their port, by a BPF program that the kernel asks (`BPF_PROG_TYPE_SK_LOOKUP`,
//! docs/adr/0022). Nothing is filtered or rewritten: who accepts such a connection reads from it
//! which address and port were meant.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::sys;

/// Places of the sockets in the map that the program looks into.
const SOCKET_V4: u32 = 0;
const SOCKET_V6: u32 = 1;

/// One instruction of eBPF, in the layout of `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Operation codes (linux/bpf_common.h, linux/bpf.h).
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const STORE_WORD: u8 = 0x62; // BPF_ST | BPF_MEM | BPF_W
const LOAD_LONG: u8 = 0x18; // BPF_LD | BPF_IMM | BPF_DW
const MOVE_REGISTER: u8 = 0xbf; // BPF_ALU64 | BPF_MOV | BPF_X
const MOVE: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const ADD: u8 = 0x07; // BPF_ALU64 | BPF_ADD | BPF_K
const SHIFT_RIGHT: u8 = 0x77; // BPF_ALU64 | BPF_RSH | BPF_K
const FROM_NETWORK: u8 = 0xdc; // BPF_ALU | BPF_END | BPF_TO_BE
const JUMP: u8 = 0x05; // BPF_JMP | BPF_JA
const JUMP_EQUAL: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_NOT_EQUAL: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const CALL: u8 = 0x85; // BPF_JMP | BPF_CALL
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

/// That the number of a [`LOAD_LONG`] is a map's descriptor (`BPF_PSEUDO_MAP_FD`).
const MAP: u8 = 1;

/// Helpers of the kernel (`BPF_FUNC_*`).
const MAP_LOOKUP: i32 = 1;
const SOCKET_RELEASE: i32 = 86;
const SOCKET_ASSIGN: i32 = 124;

/// Fields of `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_V4: i16 = 40;
const LOCAL_V6: [i16; 4] = [44, 48, 52, 56];

const AF_INET: i32 = 2;
const AF_INET6: i32 = 10;
const TCP: i32 = 6;

/// `SK_PASS`: go on, with the socket that was assigned, or as ever.
const PASS: i32 = 1;

/// Registers: the answer, arguments, and two that calls leave alone.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const CONTEXT: u8 = 6;
const SOCKET: u8 = 7;
const FRAME: u8 = 10;

/// Where the key is on the stack.
const KEY: i16 = -4;

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: to | (from << 4), offset, immediate }
}

/// A step of the program, or a jump to a later part of it.
enum Step {
    Do(Instruction),
    /// A jump (its code, of a register and a number) to a label.
    To(Label, u8, u8, i32),
    Here(Label),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Label {
    V6,
    Found,
    Pass,
}

/// The program; `map` is the descriptor of the map of sockets.
fn program(map: i32) -> Vec<Instruction> {
    use Step::{Do, Here, To};
    let mut steps = vec![
        Do(instruction(MOVE_REGISTER, CONTEXT, R1, 0, 0)),
        Do(instruction(LOAD_WORD, R2, CONTEXT, PROTOCOL, 0)),
        To(Label::Pass, JUMP_NOT_EQUAL, R2, TCP),
        Do(instruction(LOAD_WORD, R2, CONTEXT, FAMILY, 0)),
        To(Label::V6, JUMP_EQUAL, R2, AF_INET6),
        To(Label::Pass, JUMP_NOT_EQUAL, R2, AF_INET),
        // 127.0.0.0/8
        Do(instruction(LOAD_WORD, R2, CONTEXT, LOCAL_V4, 0)),
        Do(instruction(FROM_NETWORK, R2, 0, 0, 32)),
        Do(instruction(SHIFT_RIGHT, R2, 0, 0, 24)),
        To(Label::Pass, JUMP_NOT_EQUAL, R2, 127),
        Do(instruction(STORE_WORD, FRAME, 0, KEY, SOCKET_V4.cast_signed())),
        To(Label::Found, JUMP, 0, 0),
        Here(Label::V6),
    ];
    // ::1
    for (field, word) in LOCAL_V6.into_iter().zip([0, 0, 0, 1]) {
        steps.push(Do(instruction(LOAD_WORD, R2, CONTEXT, field, 0)));
        steps.push(Do(instruction(FROM_NETWORK, R2, 0, 0, 32)));
        steps.push(To(Label::Pass, JUMP_NOT_EQUAL, R2, word));
    }
    steps.extend([
        Do(instruction(STORE_WORD, FRAME, 0, KEY, SOCKET_V6.cast_signed())),
        Here(Label::Found),
        Do(instruction(LOAD_LONG, R1, MAP, 0, map)),
        // Its upper half.
        Do(instruction(0, 0, 0, 0, 0)),
        Do(instruction(MOVE_REGISTER, R2, FRAME, 0, 0)),
        Do(instruction(ADD, R2, 0, 0, i32::from(KEY))),
        Do(instruction(CALL, 0, 0, 0, MAP_LOOKUP)),
        // Closed: there is no such socket any more.
        To(Label::Pass, JUMP_EQUAL, R0, 0),
        Do(instruction(MOVE_REGISTER, SOCKET, R0, 0, 0)),
        Do(instruction(MOVE_REGISTER, R1, CONTEXT, 0, 0)),
        Do(instruction(MOVE_REGISTER, R2, SOCKET, 0, 0)),
        Do(instruction(MOVE, R3, 0, 0, 0)),
        Do(instruction(CALL, 0, 0, 0, SOCKET_ASSIGN)),
        Do(instruction(MOVE_REGISTER, R1, SOCKET, 0, 0)),
        Do(instruction(CALL, 0, 0, 0, SOCKET_RELEASE)),
        Here(Label::Pass),
        Do(instruction(MOVE, R0, 0, 0, PASS)),
        Do(instruction(EXIT, 0, 0, 0, 0)),
    ]);
    link(&steps)
}

/// The instructions, with jumps as far as their labels are away.
fn link(steps: &[Step]) -> Vec<Instruction> {
    let length =
        |steps: &[Step]| steps.iter().filter(|step| !matches!(step, Step::Here(_))).count();
    let mut all = Vec::new();
    for (at, step) in steps.iter().enumerate() {
        match step {
            Step::Here(_) => {}
            Step::Do(instruction) => all.push(*instruction),
            Step::To(label, code, register, number) => {
                let rest = steps.get(at.saturating_add(1)..).unwrap_or_default();
                let is_it = |step: &Step| matches!(step, Step::Here(here) if here == label);
                let between = rest.split(is_it).next().unwrap_or_default();
                // A few dozen instructions: it always fits.
                let offset = i16::try_from(length(between)).unwrap_or(i16::MAX);
                all.push(instruction(*code, *register, 0, offset, *number));
            }
        }
    }
    all
}

/// The redirection of a namespace; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Lookup(OwnedFd);

impl Drop for Lookup {
    fn drop(&mut self) {
        // It ends with its last descriptor as well, but that can be for a moment that of a process
        // which is being started.
        if let Err(error) = sys::end_link(self.0.as_fd()) {
            tracing::debug!(%error, "a redirection ends by itself");
        }
    }
}

/// Sends TCP connections to 127.0.0.0/8 and ::1 in a network namespace to these sockets, which listen
/// there. Each family only if there is a socket for it.
///
/// # Errors
/// What the kernel answers: `EPERM` without privileges, `EINVAL` before Linux 5.9.
pub(crate) fn redirect(
    netns: BorrowedFd<'_>,
    v4: BorrowedFd<'_>,
    v6: Option<BorrowedFd<'_>>,
) -> io::Result<Lookup> {
    let map = sys::make_socket_map(2)?;
    sys::put_socket(map.as_fd(), SOCKET_V4, v4)?;
    if let Some(v6) = v6 {
        sys::put_socket(map.as_fd(), SOCKET_V6, v6)?;
    }
    // The program keeps the map, and the link the program.
    let program = sys::load_lookup_program(program, map.as_fd())?;
    Ok(Lookup(sys::link_lookup_program(program.as_fd(), netns)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_jump_goes_to_an_instruction_and_over_its_part() {
        let program = program(7);
        assert_eq!(program.last().map(|last| last.code), Some(EXIT));
        let jumps = [JUMP, JUMP_EQUAL, JUMP_NOT_EQUAL];
        let pass = program.len() - 2;
        for (at, step) in program.iter().enumerate() {
            if jumps.contains(&step.code) {
                let to = at + 1 + usize::try_from(step.offset).unwrap();
                // To the end, or past the part of the other family.
                assert!(to == pass || program[to - 1].code != CALL, "{at} -> {to}");
                assert!(to <= pass && step.offset > 0, "{at} -> {to}");
            }
        }
    }
}
