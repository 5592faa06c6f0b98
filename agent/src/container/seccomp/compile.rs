//! A profile as a BPF program.
//!
//! ```text
//!  architecture? ── x86-64 ──▶ search by number ──▶ decision: return, or test arguments
//!       │     └──── i386 ────▶ search by number ──▶ ...
//!       └─ another, or one that the profile does not name: kill
//! ```
//! The search is a binary one over ranges of numbers with the same decision, so that a call costs
//! about ten instructions however long the profile is.

use std::collections::{BTreeMap, HashMap};

use super::abi::{AUDIT_ARCH_I386, AUDIT_ARCH_X86_64, Abi, X32_BIT};
use super::bpf::{
    AND, Assembler, EQUAL, GREATER, GREATER_OR_EQUAL, Instruction, LOAD, Label, TooLong,
};
use super::profile::{Action, Condition, ENOSYS, KILL_THREAD, Profile, Test};

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// What a call is answered that none of the profile's architectures can have made, as by libseccomp.
const BAD_ARCHITECTURE: Action = KILL_THREAD;

/// What happens to the calls of some number.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Decision {
    /// The first whose conditions all hold decides. None is without conditions.
    rules: Vec<(Vec<Condition>, Action)>,
    otherwise: Action,
    /// Whether arguments have 64 bits.
    wide: bool,
}

impl Decision {
    fn always(action: Action) -> Self {
        Self { rules: Vec::new(), otherwise: action, wide: false }
    }
}

/// Ranges of numbers in ascending order, each from its first number up to the next range.
#[derive(Debug, Default)]
struct Ranges(Vec<(u32, Decision)>);

impl Ranges {
    fn add(&mut self, first: u32, decision: Decision) {
        match self.0.last_mut() {
            Some((start, last)) if *start == first => *last = decision,
            Some((_, last)) if *last == decision => {}
            _ => self.0.push((first, decision)),
        }
    }
}

/// Compiles a profile.
///
/// # Errors
/// [`TooLong`].
pub(super) fn compile(profile: &Profile) -> Result<Vec<Instruction>, TooLong> {
    let mut assembler = Assembler::default();
    let mut decisions = HashMap::new();
    let mut next = assembler.ret(BAD_ARCHITECTURE)?;
    for (architecture, ranges) in architectures(profile) {
        let search = search(&mut assembler, &mut decisions, &ranges.0)?;
        let section = assembler.before(LOAD, NUMBER, search)?;
        next = assembler.branch(EQUAL, architecture, section, next)?;
    }
    let entry = assembler.before(LOAD, ARCHITECTURE, next)?;
    assembler.finish(entry)
}

/// The ranges of each architecture that a call can come from. The machine's own last, which is
/// written last and so tested first.
fn architectures(profile: &Profile) -> Vec<(u32, Ranges)> {
    let mut all = Vec::new();
    if profile.abis.contains(&Abi::X86) {
        let mut ranges = Ranges::default();
        lay_out(profile, Abi::X86, 0, &mut ranges);
        all.push((AUDIT_ARCH_I386, ranges));
    }
    let mut ranges = Ranges::default();
    lay_out(profile, Abi::X86_64, 0, &mut ranges);
    if profile.abis.contains(&Abi::X32) {
        lay_out(profile, Abi::X32, X32_BIT, &mut ranges);
    } else {
        ranges.add(X32_BIT, Decision::always(BAD_ARCHITECTURE));
    }
    // -1 is no call of x32, but a call that a tracer has cancelled.
    ranges.add(u32::MAX, Decision::always(profile.default));
    all.push((AUDIT_ARCH_X86_64, ranges));
    all
}

/// Adds the ranges of one interface, whose numbers begin with `base`.
fn lay_out(profile: &Profile, abi: Abi, base: u32, ranges: &mut Ranges) {
    let mut rules: BTreeMap<u32, Vec<(Vec<Condition>, Action)>> = BTreeMap::new();
    for rule in &profile.rules {
        for number in rule.names.iter().flat_map(|name| abi.numbers(name)) {
            let here = rules.entry(number.number).or_default();
            // One that says what holds anyhow is not there, as in runc, but its number is known.
            if rule.action != profile.default {
                here.push((conditions(rule.conditions.as_slice(), number.selector), rule.action));
            }
        }
    }
    let mut next = base;
    for (number, rules) in rules {
        if number > next {
            ranges.add(next, Decision::always(profile.default));
        }
        ranges.add(number, decision(rules, profile.default, abi.wide()));
        next = number.saturating_add(1);
    }
    let beyond = if next > base && profile.hides_new_calls() { ENOSYS } else { profile.default };
    ranges.add(next, Decision::always(beyond));
}

/// The conditions of a rule for a number that several calls share. What selects the call is in the
/// place of its first argument, so that a condition on that cannot be checked, as in libseccomp: the
/// arguments are in memory, which a filter does not see.
fn conditions(given: &[Condition], selector: Option<Condition>) -> Vec<Condition> {
    match selector {
        None => given.to_vec(),
        Some(selector) => {
            let others = given.iter().filter(|c| c.argument != selector.argument);
            [selector].into_iter().chain(others.copied()).collect()
        }
    }
}

/// Puts the rules of a number together. One without conditions makes all others void, and the first
/// of several such is the one that counts, as in libseccomp.
fn decision(mut rules: Vec<(Vec<Condition>, Action)>, default: Action, wide: bool) -> Decision {
    if let Some((_, action)) = rules.iter().find(|(conditions, _)| conditions.is_empty()) {
        return Decision::always(*action);
    }
    if rules.is_empty() {
        return Decision::always(default);
    }
    rules.dedup();
    Decision { rules, otherwise: default, wide }
}

/// Writes the search among ranges, of which there is at least one.
fn search(
    assembler: &mut Assembler,
    written: &mut HashMap<Decision, Label>,
    ranges: &[(u32, Decision)],
) -> Result<Label, TooLong> {
    let (low, high) = ranges.split_at(ranges.len() / 2);
    match (low, high) {
        ([], []) => assembler.ret(BAD_ARCHITECTURE),
        ([], [(_, decision), ..]) => decide(assembler, written, decision),
        (_, [(first, _), ..]) => {
            let high = search(assembler, written, high)?;
            let low = search(assembler, written, low)?;
            assembler.branch(GREATER_OR_EQUAL, *first, high, low)
        }
        (_, []) => search(assembler, written, low),
    }
}

/// Writes a decision, once.
fn decide(
    assembler: &mut Assembler,
    written: &mut HashMap<Decision, Label>,
    decision: &Decision,
) -> Result<Label, TooLong> {
    if decision.rules.is_empty() {
        return assembler.ret(decision.otherwise);
    }
    if let Some(label) = written.get(decision) {
        return Ok(*label);
    }
    let mut next = assembler.ret(decision.otherwise)?;
    for (conditions, action) in decision.rules.iter().rev() {
        let mut yes = assembler.ret(*action)?;
        for condition in conditions.iter().rev() {
            yes = test(assembler, *condition, decision.wide, yes, next)?;
        }
        next = yes;
    }
    written.insert(decision.clone(), next);
    Ok(next)
}

/// The halves of a constant or of an argument: low, high.
fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

/// Writes a test of an argument. One of 32 bits is compared with the lower half of the constants, as
/// by libseccomp, so that a negative number can be written with 64 bits for all architectures.
fn test(
    assembler: &mut Assembler,
    condition: Condition,
    wide: bool,
    yes: Label,
    no: Label,
) -> Result<Label, TooLong> {
    let at = ARGUMENTS + 8 * u32::from(condition.argument);
    let equal = |assembler: &mut Assembler, mask, value, yes, no| {
        let ((mask_low, mask_high), (low, high)) = (halves(mask), halves(value));
        let rest = half_equal(assembler, at, (mask_low, low), yes, no)?;
        if wide { half_equal(assembler, at + 4, (mask_high, high), rest, no) } else { Ok(rest) }
    };
    match condition.test {
        Test::Equal(value) => equal(assembler, u64::MAX, value, yes, no),
        Test::NotEqual(value) => equal(assembler, u64::MAX, value, no, yes),
        Test::MaskedEqual { mask, value } => equal(assembler, mask, value, yes, no),
        Test::Greater(value) => ordered(assembler, at, wide, (GREATER, value), yes, no),
        Test::LessOrEqual(value) => ordered(assembler, at, wide, (GREATER, value), no, yes),
        Test::GreaterOrEqual(value) => {
            ordered(assembler, at, wide, (GREATER_OR_EQUAL, value), yes, no)
        }
        Test::Less(value) => ordered(assembler, at, wide, (GREATER_OR_EQUAL, value), no, yes),
    }
}

/// Writes a test of whether the word at `offset`, masked, has a value.
fn half_equal(
    assembler: &mut Assembler,
    offset: u32,
    (mask, value): (u32, u32),
    yes: Label,
    no: Label,
) -> Result<Label, TooLong> {
    if mask == 0 {
        return Ok(if value == 0 { yes } else { no });
    }
    let mut label = assembler.branch(EQUAL, value, yes, no)?;
    if mask != u32::MAX {
        label = assembler.before(AND, mask, label)?;
    }
    assembler.before(LOAD, offset, label)
}

/// Writes a test of whether the argument at `offset` is above the value (or not below it).
fn ordered(
    assembler: &mut Assembler,
    offset: u32,
    wide: bool,
    (comparison, value): (u16, u64),
    yes: Label,
    no: Label,
) -> Result<Label, TooLong> {
    let (low, high) = halves(value);
    let compare = assembler.branch(comparison, low, yes, no)?;
    let low = assembler.before(LOAD, offset, compare)?;
    if !wide {
        return Ok(low);
    }
    let not_above = assembler.branch(EQUAL, high, low, no)?;
    let compare = assembler.branch(GREATER, high, yes, not_above)?;
    assembler.before(LOAD, offset + 4, compare)
}

#[cfg(test)]
#[path = "compile_tests.rs"]
mod tests;
