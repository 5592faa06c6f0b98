//! Classic BPF, as far as a seccomp filter needs it, assembled from its end to its beginning: jumps
//! only lead forwards, so that every target is known when a jump to it is written.

/// One instruction (`struct sock_filter` of linux/filter.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Instruction {
    pub(super) code: u16,
    pub(super) jump_true: u8,
    pub(super) jump_false: u8,
    pub(super) operand: u32,
}

/// BPF_LD | BPF_W | BPF_ABS: load a word of `seccomp_data`.
pub(super) const LOAD: u16 = 0x20;
/// BPF_ALU | BPF_AND | BPF_K
pub(super) const AND: u16 = 0x54;
/// BPF_JMP | BPF_JA
pub(super) const JUMP: u16 = 0x05;
/// BPF_JMP | BPF_JEQ | BPF_K
pub(super) const EQUAL: u16 = 0x15;
/// BPF_JMP | BPF_JGT | BPF_K
pub(super) const GREATER: u16 = 0x25;
/// BPF_JMP | BPF_JGE | BPF_K
pub(super) const GREATER_OR_EQUAL: u16 = 0x35;
/// BPF_RET | BPF_K
pub(super) const RETURN: u16 = 0x06;

/// Most instructions of a program that the kernel takes (BPF_MAXINSNS).
pub(super) const MAX_INSTRUCTIONS: usize = 4096;

/// Farthest target of a conditional jump, in instructions that it skips.
const NEAR: usize = 255;

/// The program has more than [`MAX_INSTRUCTIONS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooLong;

/// An instruction that has been written, counted from the end of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Label(usize);

/// A program that grows at its beginning.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    reversed: Vec<Instruction>,
    /// The latest return of each value.
    returns: std::collections::BTreeMap<u32, Label>,
}

impl Assembler {
    fn push(&mut self, code: u16, operand: u32, jumps: (u8, u8)) -> Result<Label, TooLong> {
        if self.reversed.len() >= MAX_INSTRUCTIONS {
            return Err(TooLong);
        }
        let (jump_true, jump_false) = jumps;
        self.reversed.push(Instruction { code, jump_true, jump_false, operand });
        Ok(Label(self.reversed.len() - 1))
    }

    /// How many instructions a jump that is written now has to skip.
    fn distance(&self, to: Label) -> usize {
        self.reversed.len().saturating_sub(to.0).saturating_sub(1)
    }

    /// The target itself, or an unconditional jump to it if it is too far for a conditional one that
    /// is written after at most `spare` more instructions.
    fn near(&mut self, to: Label, spare: usize) -> Result<Label, TooLong> {
        let distance = self.distance(to);
        if distance + spare <= NEAR {
            return Ok(to);
        }
        self.push(JUMP, u32::try_from(distance).map_err(|_| TooLong)?, (0, 0))
    }

    /// A return of this value.
    pub(super) fn ret(&mut self, value: u32) -> Result<Label, TooLong> {
        // A new one costs as much as a jump to one that is far.
        let near = self.returns.get(&value).filter(|label| self.distance(**label) + 2 <= NEAR);
        if let Some(label) = near {
            return Ok(*label);
        }
        let label = self.push(RETURN, value, (0, 0))?;
        self.returns.insert(value, label);
        Ok(label)
    }

    /// An instruction that goes on to `next`.
    pub(super) fn before(
        &mut self,
        code: u16,
        operand: u32,
        next: Label,
    ) -> Result<Label, TooLong> {
        let distance = self.distance(next);
        if distance > 0 {
            self.push(JUMP, u32::try_from(distance).map_err(|_| TooLong)?, (0, 0))?;
        }
        self.push(code, operand, (0, 0))
    }

    /// A comparison with `operand`, and where to go.
    pub(super) fn branch(
        &mut self,
        code: u16,
        operand: u32,
        yes: Label,
        no: Label,
    ) -> Result<Label, TooLong> {
        if yes == no {
            return Ok(yes);
        }
        let yes = self.near(yes, 1)?;
        let no = self.near(no, 0)?;
        let jump = |to| u8::try_from(self.distance(to)).map_err(|_| TooLong);
        let jumps = (jump(yes)?, jump(no)?);
        self.push(code, operand, jumps)
    }

    /// The program, which begins at `entry`.
    pub(super) fn finish(mut self, entry: Label) -> Result<Vec<Instruction>, TooLong> {
        let distance = self.distance(entry);
        if distance > 0 {
            self.push(JUMP, u32::try_from(distance).map_err(|_| TooLong)?, (0, 0))?;
        }
        self.reversed.reverse();
        Ok(self.reversed)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What a filter sees of a call (`struct seccomp_data`).
    #[derive(Debug, Clone, Copy)]
    pub(in super::super) struct Data {
        pub(in super::super) number: u32,
        pub(in super::super) arch: u32,
        pub(in super::super) arguments: [u64; 6],
    }

    impl Data {
        fn word(&self, offset: u32) -> u32 {
            assert_eq!(offset % 4, 0);
            match offset {
                0 => self.number,
                4 => self.arch,
                16..=63 => {
                    let (index, high) = ((offset - 16) / 8, !offset.is_multiple_of(8));
                    let value = self.arguments[index as usize];
                    if high { (value >> 32) as u32 } else { value as u32 }
                }
                other => panic!("no filter of ours reads at {other}"),
            }
        }
    }

    /// Runs a program. Returns its value and how many instructions it took.
    pub(in super::super) fn run(program: &[Instruction], data: &Data) -> (u32, usize) {
        let (mut at, mut accumulator) = (0, 0);
        for steps in 1.. {
            let Instruction { code, jump_true, jump_false, operand } = program[at];
            let jump = |yes| usize::from(if yes { jump_true } else { jump_false });
            at += 1 + match code {
                LOAD => {
                    accumulator = data.word(operand);
                    0
                }
                AND => {
                    accumulator &= operand;
                    0
                }
                JUMP => operand as usize,
                EQUAL => jump(accumulator == operand),
                GREATER => jump(accumulator > operand),
                GREATER_OR_EQUAL => jump(accumulator >= operand),
                RETURN => return (operand, steps),
                other => panic!("no instruction {other:#x}"),
            };
        }
        unreachable!()
    }

    /// What the kernel demands before it takes a program: known instructions, jumps inside it, and
    /// a return at its end.
    pub(in super::super) fn check(program: &[Instruction]) {
        assert!(!program.is_empty() && program.len() <= MAX_INSTRUCTIONS);
        for (at, instruction) in program.iter().enumerate() {
            let furthest = match instruction.code {
                EQUAL | GREATER | GREATER_OR_EQUAL => {
                    usize::from(instruction.jump_true.max(instruction.jump_false))
                }
                JUMP => instruction.operand as usize,
                LOAD => {
                    assert!(instruction.operand % 4 == 0 && instruction.operand < 64);
                    0
                }
                AND | RETURN => 0,
                other => panic!("no instruction {other:#x}"),
            };
            assert!(instruction.code == RETURN || at + 1 + furthest < program.len(), "at {at}");
        }
    }

    #[test]
    fn a_target_that_is_too_far_is_reached_all_the_same() {
        let mut assembler = Assembler::default();
        let far = assembler.ret(1).unwrap();
        let mut next = assembler.ret(2).unwrap();
        for _ in 0..600 {
            next = assembler.before(AND, u32::MAX, next).unwrap();
        }
        let both = assembler.branch(EQUAL, 7, far, next).unwrap();
        let entry = assembler.before(LOAD, 0, both).unwrap();
        let program = assembler.finish(entry).unwrap();
        check(&program);
        let data = |number| Data { number, arch: 0, arguments: [0; 6] };
        assert_eq!(run(&program, &data(7)), (1, 4));
        assert_eq!(run(&program, &data(8)).0, 2);
    }

    #[test]
    fn a_program_that_the_kernel_would_refuse_is_an_error() {
        let mut assembler = Assembler::default();
        let mut next = assembler.ret(0).unwrap();
        for _ in 1..MAX_INSTRUCTIONS {
            next = assembler.before(AND, 0, next).unwrap();
        }
        assert_eq!(assembler.before(AND, 0, next), Err(TooLong));
    }
}
