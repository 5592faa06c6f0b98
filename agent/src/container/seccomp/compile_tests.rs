//! The compiled program does what the profile means: run by an interpreter, and compared with a
//! second, slow reading of the profile that shares nothing with the compiler but the tables of
//! numbers.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::bpf::tests::{Data, check, run};
use super::super::profile::{ALLOW, Rule, Seccomp};
use super::*;

fn profile(json: Value) -> Profile {
    Profile::new(&serde_json::from_value::<Seccomp>(json).unwrap()).unwrap()
}

fn compiled(json: Value) -> Vec<Instruction> {
    let program = compile(&profile(json)).unwrap();
    check(&program);
    program
}

fn call(arch: u32, number: u32, arguments: [u64; 6]) -> Data {
    Data { number, arch, arguments }
}

fn answer(program: &[Instruction], arch: u32, number: u32, first: u64) -> u32 {
    run(program, &call(arch, number, [first, 0, 0, 0, 0, 0])).0
}

const ERRNO: u32 = 0x0005_0000;
const KILL_PROCESS: u32 = 0x8000_0000;
const X64: u32 = AUDIT_ARCH_X86_64;

/// Whether a condition holds, for a value of 64 or 32 bits.
fn holds(test: Test, argument: u64, wide: bool) -> bool {
    let cut = |v: u64| if wide { v } else { v & 0xffff_ffff };
    let a = cut(argument);
    match test {
        Test::NotEqual(v) => a != cut(v),
        Test::Less(v) => a < cut(v),
        Test::LessOrEqual(v) => a <= cut(v),
        Test::Equal(v) => a == cut(v),
        Test::GreaterOrEqual(v) => a >= cut(v),
        Test::Greater(v) => a > cut(v),
        Test::MaskedEqual { mask, value } => a & cut(mask) == cut(value),
    }
}

/// What a profile means for a call, read from the top.
fn meaning(profile: &Profile, data: &Data) -> u32 {
    let abi = match (data.arch, data.number) {
        (AUDIT_ARCH_X86_64, u32::MAX) => return profile.default,
        (AUDIT_ARCH_X86_64, number) if number >= X32_BIT => Abi::X32,
        (AUDIT_ARCH_X86_64, _) => Abi::X86_64,
        (AUDIT_ARCH_I386, _) => Abi::X86,
        _ => return KILL_THREAD,
    };
    if !profile.abis.contains(&abi) {
        return KILL_THREAD;
    }
    let every = || profile.rules.iter().flat_map(|r| r.names.iter().map(move |n| (n, r)));
    let mut matching: Vec<(bool, u32)> = Vec::new();
    let mut greatest = None;
    for (name, Rule { conditions, action, .. }) in every() {
        for number in abi.numbers(name) {
            greatest = greatest.max(Some(number.number));
            if number.number != data.number || *action == profile.default {
                continue;
            }
            let test =
                |c: &Condition| holds(c.test, data.arguments[usize::from(c.argument)], abi.wide());
            let selected = number.selector.is_none_or(|s| test(&s));
            let rest = conditions
                .iter()
                .filter(|c| number.selector.is_none_or(|s| s.argument != c.argument))
                .all(test);
            let unconditional = number.selector.is_none() && conditions.is_empty();
            if selected && rest {
                matching.push((unconditional, *action));
            }
        }
    }
    let first_of = |unconditional| matching.iter().find(|(u, _)| *u == unconditional);
    if let Some((_, action)) = first_of(true).or_else(|| first_of(false)) {
        return *action;
    }
    let beyond = greatest.is_some_and(|g| data.number > g);
    if beyond && profile.hides_new_calls() { ENOSYS } else { profile.default }
}

#[test]
fn an_allow_list_lets_through_what_it_names() {
    let program = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{"names": ["read", "write", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
                     {"names": ["mseal"], "action": "SCMP_ACT_KILL_PROCESS"}],
    }));
    assert_eq!(answer(&program, X64, 0, 0), ALLOW);
    assert_eq!(answer(&program, X64, 1, 0), ALLOW);
    assert_eq!(answer(&program, X64, 2, 0), ERRNO | 1, "EPERM");
    assert_eq!(answer(&program, X64, 462, 0), KILL_PROCESS);
    assert_eq!(answer(&program, X64, 463, 0), ENOSYS, "newer than all that it names");
    assert_eq!(answer(&program, X64, X32_BIT, 0), KILL_THREAD, "x32 is not listed");
    assert_eq!(answer(&program, X64, u32::MAX, 0), ERRNO | 1, "cancelled by a tracer");
    assert_eq!(answer(&program, AUDIT_ARCH_I386, 3, 0), KILL_THREAD, "i386 is not listed");
    assert_eq!(answer(&program, 0xc000_00b7, 63, 0), KILL_THREAD, "no such machine");
}

#[test]
fn a_list_of_the_forbidden_lets_new_calls_through() {
    let program = compiled(json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86", "SCMP_ARCH_AARCH64"],
        "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
    }));
    assert_eq!(answer(&program, X64, 165, 0), ERRNO | 38);
    assert_eq!(answer(&program, AUDIT_ARCH_I386, 21, 0), ERRNO | 38);
    assert_eq!(answer(&program, X64, 999, 0), ALLOW);
}

#[test]
fn a_default_of_enosys_is_left_alone() {
    let rules = json!([{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]);
    let program = compiled(
        json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "syscalls": rules}),
    );
    assert_eq!(answer(&program, X64, 999, 0), ENOSYS);
    let program = compiled(json!({"defaultAction": "SCMP_ACT_KILL_PROCESS", "syscalls": rules}));
    assert_eq!(answer(&program, X64, 999, 0), ENOSYS);
    let program = compiled(json!({"defaultAction": "SCMP_ACT_TRACE", "syscalls": rules}));
    assert_eq!(answer(&program, X64, 999, 0), 0x7ff0_0001);
}

#[test]
fn conditions_compare_all_64_bits() {
    let rule = |op: &str, value: u64, two: u64| {
        compiled(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": ["personality"], "action": "SCMP_ACT_ALLOW",
                          "args": [{"index": 0, "value": value, "valueTwo": two, "op": op}]}],
        }))
    };
    let big = 0x1_0000_0005_u64;
    for (op, below, same, above) in [
        ("SCMP_CMP_NE", true, false, true),
        ("SCMP_CMP_LT", true, false, false),
        ("SCMP_CMP_LE", true, true, false),
        ("SCMP_CMP_EQ", false, true, false),
        ("SCMP_CMP_GE", false, true, true),
        ("SCMP_CMP_GT", false, false, true),
    ] {
        let program = rule(op, big, 0);
        // 5 and 2^33 + 1 are below and above it by their upper halves, but not by their lower ones.
        for (value, allowed) in
            [(5, below), (big - 1, below), (big, same), (big + 1, above), ((1 << 33) + 1, above)]
        {
            let expected = if allowed { ALLOW } else { ERRNO | 1 };
            assert_eq!(answer(&program, X64, 135, value), expected, "{op} {value}");
        }
    }
    let program = rule("SCMP_CMP_MASKED_EQ", 0xf_0000_000f, 0x1_0000_0002);
    assert_eq!(answer(&program, X64, 135, 0xf1_ffff_fff2), ALLOW);
    assert_eq!(answer(&program, X64, 135, 0xf2_ffff_fff2), ERRNO | 1);
    assert_eq!(answer(&program, X64, 135, 0xf1_ffff_fff3), ERRNO | 1);
}

#[test]
fn conditions_of_one_entry_must_all_hold_and_entries_are_alternatives() {
    let equal = |index, value| json!({"index": index, "value": value, "op": "SCMP_CMP_EQ"});
    let program = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [equal(0, 1), equal(1, 2)]},
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [equal(0, 16)]},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [equal(0, 7), equal(0, 8)]},
        ],
    }));
    let socket = |a, b| run(&program, &call(X64, 41, [a, b, 0, 0, 0, 0])).0;
    assert_eq!((socket(1, 2), socket(1, 3), socket(16, 3)), (ALLOW, ERRNO | 1, ALLOW));
    let clone = |a| answer(&program, X64, 56, a);
    assert_eq!((clone(7), clone(8), clone(9)), (ALLOW, ALLOW, ERRNO | 1), "the same one twice");
}

#[test]
fn calls_by_socketcall_are_selected_by_its_first_argument() {
    let program = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86"],
        "syscalls": [{"names": ["connect", "shmget"], "action": "SCMP_ACT_ALLOW"}],
    }));
    let i386 = |number, first| answer(&program, AUDIT_ARCH_I386, number, first);
    assert_eq!((i386(102, 3), i386(102, 2), i386(362, 9)), (ALLOW, ERRNO | 1, ALLOW));
    assert_eq!(
        (i386(117, 23), i386(117, (1 << 16) | 23), i386(117, 24)),
        (ALLOW, ALLOW, ERRNO | 1)
    );
}

/// Every call that there is, by name.
fn every_name() -> Vec<&'static str> {
    syscalls::x86_64::Sysno::iter().map(|s| s.name()).collect()
}

#[test]
fn a_profile_of_every_call_is_short_and_quick() {
    // Every third call is left out, which makes as many ranges as possible.
    let names: Vec<_> = every_name().into_iter().enumerate().filter(|(i, _)| i % 3 != 0).collect();
    let names: Vec<_> = names.into_iter().map(|(_, name)| name).collect();
    let program = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}],
    }));
    assert!(program.len() < 2000, "{}", program.len());
    for number in 0..500 {
        let (_, steps) = run(&program, &call(X64, number, [0; 6]));
        assert!(steps < 32, "{number} takes {steps}");
    }
}

#[test]
fn a_profile_that_no_program_can_hold_is_an_error() {
    let rules: Vec<_> = (0..2000)
        .map(|value| {
            json!({"names": ["ioctl"], "action": "SCMP_ACT_ALLOW",
                   "args": [{"index": 1, "value": value * 7, "op": "SCMP_CMP_EQ"}]})
        })
        .collect();
    let profile = profile(json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}));
    assert_eq!(compile(&profile), Err(TooLong));
}

const NAMES: [&str; 14] = [
    "read",
    "openat",
    "clone",
    "socket",
    "socketcall",
    "accept",
    "shmget",
    "ipc",
    "semtimedop",
    "ioctl",
    "stat64",
    "execve",
    "mseal",
    "no_such_call",
];
const ACTIONS: [&str; 7] = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_LOG",
    "SCMP_ACT_TRACE",
];
const OPERATORS: [&str; 7] = [
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_MASKED_EQ",
];
/// Close to each other, and on both sides of 32 bits.
const VALUES: [u64; 11] = [
    0,
    1,
    2,
    3,
    23,
    0xffff_ffff,
    0x1_0000_0000,
    0x1_0000_0001,
    0x1_0000_0002,
    0xffff_ffff_0000_0001,
    u64::MAX,
];

fn any_rule() -> impl Strategy<Value = Value> {
    let argument = (
        0..6_u32,
        prop::sample::select(&VALUES[..]),
        prop::sample::select(&VALUES[..]),
        prop::sample::select(&OPERATORS[..]),
    );
    (
        prop::collection::vec(prop::sample::select(&NAMES[..]), 1..5),
        prop::sample::select(&ACTIONS[..]),
        prop::collection::vec(argument, 0..4),
    )
        .prop_map(|(names, action, arguments)| {
            let arguments: Vec<_> = arguments
                .into_iter()
                .map(|(i, v, w, op)| json!({"index": i, "value": v, "valueTwo": w, "op": op}))
                .collect();
            json!({"names": names, "action": action, "args": arguments})
        })
}

fn any_profile() -> impl Strategy<Value = Profile> {
    (
        prop::sample::select(&ACTIONS[..]),
        prop::sample::subsequence(
            vec!["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_ARM"],
            0..=4,
        ),
        prop::collection::vec(any_rule(), 0..12),
    )
        .prop_map(|(default, architectures, rules)| {
            profile(json!({"defaultAction": default, "architectures": architectures,
                           "syscalls": rules}))
        })
}

fn any_call() -> impl Strategy<Value = Data> {
    let known: Vec<u32> = NAMES
        .iter()
        .flat_map(|name| [Abi::X86, Abi::X86_64, Abi::X32].map(|abi| abi.numbers(name)))
        .flatten()
        .map(|n| n.number)
        .chain([u32::MAX, X32_BIT, 600, X32_BIT + 600])
        .collect();
    (
        prop_oneof![4 => prop::sample::select(known), 1 => any::<u32>()],
        prop::sample::select(vec![X64, X64, AUDIT_ARCH_I386, AUDIT_ARCH_I386, 0x4000_0028]),
        prop::array::uniform6(prop::sample::select(&VALUES[..])),
    )
        .prop_map(|(number, arch, arguments)| call(arch, number, arguments))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_compiled_profile_does_what_it_means(
        profile in any_profile(),
        calls in prop::collection::vec(any_call(), 1..24),
    ) {
        let program = compile(&profile).unwrap();
        check(&program);
        for data in calls {
            prop_assert_eq!(run(&program, &data).0, meaning(&profile, &data), "{:?}", data);
        }
    }
}
