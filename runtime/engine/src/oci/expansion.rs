//! `$(VAR)` as Kubernetes expands it (`k8s.io/kubernetes/third_party/forked/golang/expansion`).
//!
//! `$(NAME)` is replaced if there is a variable NAME, and else left as it is; `$$` is one `$`, so
//! that `$$(NAME)` is the text `$(NAME)`; any other `$` is itself.

/// The result would be longer than allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooLong;

/// Expands `input`, into at most `max_len` bytes. What is put in is not expanded again.
pub(super) fn expand<'v>(
    input: &str,
    lookup: impl Fn(&str) -> Option<&'v str>,
    max_len: usize,
) -> Result<String, TooLong> {
    let mut output = String::new();
    let mut put = |text: &str| {
        output.push_str(text);
        if output.len() > max_len { Err(TooLong) } else { Ok(()) }
    };
    let mut rest = input;
    // Once no parenthesis closes, none will: not looking again keeps this linear.
    let mut may_close = true;
    while let Some((before, after)) = rest.split_once('$') {
        put(before)?;
        rest = after;
        if let Some(after) = rest.strip_prefix('$') {
            put("$")?;
            rest = after;
        } else if let Some(reference) = rest.strip_prefix('(').filter(|_| may_close) {
            let Some((name, after)) = reference.split_once(')') else {
                may_close = false;
                put("$")?;
                continue;
            };
            match lookup(name) {
                Some(value) => put(value)?,
                None => {
                    put("$(")?;
                    put(name)?;
                    put(")")?;
                }
            }
            rest = after;
        } else {
            put("$")?;
        }
    }
    put(rest)?;
    Ok(output)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lookup(name: &str) -> Option<&'static str> {
        match name {
            "VAR_A" => Some("A"),
            "VAR_B" => Some("B"),
            "VAR_REF" => Some("$(VAR_A)"),
            "VAR_EMPTY" => Some(""),
            _ => None,
        }
    }

    /// The cases of Kubernetes' own test of the expansion, and some more.
    #[test]
    fn references_are_expanded_as_kubernetes_does() {
        for (input, expected) in [
            ("", ""),
            ("$(VAR_A)", "A"),
            ("___$(VAR_B)___", "___B___"),
            ("___$(VAR_B)", "___B"),
            ("$(VAR_A)-1", "A-1"),
            ("$(VAR_A)_$(VAR_B)", "A_B"),
            ("$$(VAR_B)_$(VAR_A)", "$(VAR_B)_A"),
            ("f000-$$VAR_A", "f000-$VAR_A"),
            ("foo\\$(VAR_C)bar", "foo\\$(VAR_C)bar"),
            ("foo\\\\$(VAR_C)bar", "foo\\\\$(VAR_C)bar"),
            ("foo$(VAR_EMPTY)bar", "foobar"),
            ("$(VAR_REF)", "$(VAR_A)"),
            ("$$$(VAR_A)", "$A"),
            ("$$$$(VAR_A)", "$$(VAR_A)"),
            ("$$$$$(VAR_A)", "$$A"),
            ("$VAR_A", "$VAR_A"),
            ("$x", "$x"),
            ("$", "$"),
            ("$$", "$"),
            ("a$", "a$"),
            ("$()", "$()"),
            ("$(", "$("),
            ("$(VAR_A", "$(VAR_A"),
            ("$(VAR_A$(VAR_B)", "$(VAR_A$(VAR_B)"),
            ("$(VAR_A$$", "$(VAR_A$"),
            ("$(VAR_A $(VAR_B", "$(VAR_A $(VAR_B"),
            ("$((VAR_A))", "$((VAR_A))"),
            ("$(VAR_A)$(VAR_A)", "AA"),
            ("$\u{e4}$(VAR_A)", "$\u{e4}A"),
            ("$\u{e4}", "$\u{e4}"),
        ] {
            assert_eq!(expand(input, lookup, 1000).as_deref(), Ok(expected), "{input}");
        }
    }

    #[test]
    fn a_result_over_the_limit_is_refused() {
        let long = "x".repeat(60);
        let lookup = |_: &str| Some(long.as_str());
        assert!(expand("$(A)$(A)", lookup, 120).is_ok());
        assert_eq!(expand("$(A)$(A)", lookup, 119), Err(TooLong));
        assert_eq!(expand("abc", lookup, 2), Err(TooLong));
    }

    proptest! {
        #[test]
        fn text_without_dollars_is_itself(text in "[^$]{0,50}") {
            prop_assert_eq!(expand(&text, lookup, 1000), Ok(text));
        }

        #[test]
        fn doubled_dollars_are_restored(text in "[$()A-Z_]{0,30}") {
            prop_assert_eq!(expand(&text.replace('$', "$$"), lookup, 1000), Ok(text));
        }

        #[test]
        fn unknown_names_are_left_alone(text in "([$][(][a-z]{1,5}[)]|[a-z() ]{0,5}){0,8}") {
            prop_assert_eq!(expand(&text, lookup, 1000), Ok(text));
        }

        #[test]
        fn nothing_panics_and_the_limit_holds(text in "\\PC{0,60}", max in 0_usize..80) {
            let fits = expand(&text, lookup, max).is_ok_and(|output| output.len() <= max);
            prop_assert!(fits || expand(&text, lookup, max) == Err(TooLong));
        }
    }
}
