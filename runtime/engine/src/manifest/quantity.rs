//! Kubernetes quantities (`100m`, `64Mi`, `1.5`, `2e3`), in exact integer arithmetic.
//!
//! Grammar: `k8s.io/apimachinery/pkg/api/resource`, `Quantity`. Differences, all towards strictness:
//! negative amounts, amounts of 2^63 and above (there capped), and more than
//! [`MAX_FRACTION_DIGITS`] digits after the point (there rounded) are errors.

/// Most digits after the decimal point, trailing zeros not counted.
pub const MAX_FRACTION_DIGITS: usize = 18;

/// Longest text of a quantity, in bytes.
const MAX_LEN: usize = 128;

const NANO: u128 = 1_000_000_000;

/// An amount that is not negative, less than 2^63, in steps of a billionth (finer amounts are
/// rounded up, as in Kubernetes).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity {
    nanos: u128,
}

/// Why a text is no quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// It is not of the form.
    #[error(
        "not a quantity: a number with an optional suffix (m, k, M, G, T, P, E, Ki, Mi, Gi, Ti, Pi, \
         Ei) or exponent is expected, such as 500m, 64Mi or 1.5"
    )]
    Malformed,
    /// It is less than zero.
    #[error("must not be negative")]
    Negative,
    /// It is 2^63 or more.
    #[error("too large: must be less than 2^63")]
    TooLarge,
    /// It has too many digits after the point.
    #[error("more than {MAX_FRACTION_DIGITS} digits after the point")]
    TooFine,
}

/// What a suffix multiplies with.
enum Scale {
    Binary(u32),
    Decimal(i32),
}

impl Quantity {
    /// Reads a quantity.
    ///
    /// # Errors
    /// If the text is none, or not one that husk takes.
    pub fn parse(text: &str) -> Result<Self, QuantityError> {
        if text.len() > MAX_LEN {
            return Err(QuantityError::Malformed);
        }
        let (negative, unsigned) = match text.as_bytes().first() {
            Some(b'-') => (true, text.get(1..).unwrap_or_default()),
            Some(b'+') => (false, text.get(1..).unwrap_or_default()),
            _ => (false, text),
        };
        let end =
            unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
        let (number, suffix) = unsigned.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return Err(QuantityError::Malformed);
        }
        let scale = parse_suffix(suffix)?;
        let fraction = fraction.trim_end_matches('0');
        let mut mantissa = 0_u128;
        for digit in whole.bytes().chain(fraction.bytes()) {
            mantissa = mantissa
                .checked_mul(10)
                .and_then(|m| m.checked_add(u128::from(digit.wrapping_sub(b'0'))))
                .ok_or(QuantityError::TooLarge)?;
        }
        if mantissa == 0 {
            return Ok(Quantity { nanos: 0 });
        }
        if negative {
            return Err(QuantityError::Negative);
        }
        if fraction.len() > MAX_FRACTION_DIGITS {
            return Err(QuantityError::TooFine);
        }
        let fraction_digits = i32::try_from(fraction.len()).unwrap_or(i32::MAX);
        let nanos = scaled(mantissa, fraction_digits, &scale).ok_or(QuantityError::TooLarge)?;
        if nanos.div_ceil(NANO) > i64::MAX.unsigned_abs().into() {
            return Err(QuantityError::TooLarge);
        }
        Ok(Quantity { nanos })
    }

    /// In whole units, rounded up.
    #[must_use]
    pub fn units(self) -> u64 {
        u64::try_from(self.nanos.div_ceil(NANO)).unwrap_or(u64::MAX)
    }

    /// In thousandths, rounded up. Saturates.
    #[must_use]
    pub fn millis(self) -> u64 {
        u64::try_from(self.nanos.div_ceil(NANO / 1000)).unwrap_or(u64::MAX)
    }
}

/// The suffix, or the exponent. `E` alone is exa, `E` with a number is an exponent.
fn parse_suffix(suffix: &str) -> Result<Scale, QuantityError> {
    Ok(match suffix {
        "" => Scale::Decimal(0),
        "n" => Scale::Decimal(-9),
        "u" => Scale::Decimal(-6),
        "m" => Scale::Decimal(-3),
        "k" => Scale::Decimal(3),
        "M" => Scale::Decimal(6),
        "G" => Scale::Decimal(9),
        "T" => Scale::Decimal(12),
        "P" => Scale::Decimal(15),
        "E" => Scale::Decimal(18),
        "Ki" => Scale::Binary(10),
        "Mi" => Scale::Binary(20),
        "Gi" => Scale::Binary(30),
        "Ti" => Scale::Binary(40),
        "Pi" => Scale::Binary(50),
        "Ei" => Scale::Binary(60),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E']).ok_or(QuantityError::Malformed)?;
            let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return Err(QuantityError::Malformed);
            }
            // What does not fit is beyond every other bound as well.
            let saturated = if exponent.starts_with('-') { i32::MIN } else { i32::MAX };
            Scale::Decimal(exponent.parse().unwrap_or(saturated))
        }
    })
}

/// `mantissa / 10^fraction_digits * scale` in billionths, rounded up. `None` if it overflows, which
/// it does only far above 2^63: an amount below that, times 10^18, fits.
fn scaled(mantissa: u128, fraction_digits: i32, scale: &Scale) -> Option<u128> {
    let (mantissa, exponent) = match scale {
        Scale::Binary(shift) => (mantissa.checked_mul(1_u128.checked_shl(*shift)?)?, 0),
        Scale::Decimal(exponent) => (mantissa, *exponent),
    };
    let power = exponent.saturating_add(9).saturating_sub(fraction_digits);
    if power >= 0 {
        mantissa.checked_mul(10_u128.checked_pow(power.unsigned_abs())?)
    } else {
        Some(match 10_u128.checked_pow(power.unsigned_abs()) {
            Some(divisor) => mantissa.div_ceil(divisor),
            None => 1,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn millis(text: &str) -> u64 {
        Quantity::parse(text).unwrap().millis()
    }

    fn units(text: &str) -> u64 {
        Quantity::parse(text).unwrap().units()
    }

    #[test]
    fn quantities_have_their_kubernetes_values() {
        for (text, value) in [
            ("0", 0),
            ("-0", 0),
            ("+5", 5),
            ("5.", 5),
            (".5", 1),
            ("1.5", 2),
            ("1k", 1000),
            ("1Ki", 1024),
            ("64Mi", 64 << 20),
            ("1.5Gi", 3 << 29),
            ("0.5Mi", 1 << 19),
            ("2T", 2_000_000_000_000),
            ("1Pi", 1 << 50),
            ("7Ei", 7 << 60),
            ("1E", 1_000_000_000_000_000_000),
            ("1E3", 1000),
            ("1e3", 1000),
            ("12e-1", 2),
            ("1e+2", 100),
            ("1e-99999999999", 1),
            ("0e99999999999", 0),
            ("128974848000m", 128_974_848),
            ("9223372036854775807", i64::MAX.unsigned_abs()),
            ("0000000000000000000000000000000000000000000000001", 1),
            ("1.000000000000000000000000000000", 1),
            ("7.999999999999999999Ei", 9_223_372_036_854_775_807),
        ] {
            assert_eq!(units(text), value, "{text}");
        }
        for (text, value) in [("100m", 100), ("0.1", 100), ("2", 2000), ("1u", 1), ("1500n", 1)] {
            assert_eq!(millis(text), value, "{text}");
        }
    }

    #[test]
    fn what_is_no_quantity_is_refused() {
        use QuantityError::{Malformed, Negative, TooFine, TooLarge};
        for (text, error) in [
            ("", Malformed),
            ("-", Malformed),
            (".", Malformed),
            ("1.2.3", Malformed),
            ("Mi", Malformed),
            ("1 Mi", Malformed),
            ("1mi", Malformed),
            ("1MI", Malformed),
            ("1KB", Malformed),
            ("1K", Malformed),
            ("1e", Malformed),
            ("1e+", Malformed),
            ("1e1.5", Malformed),
            ("0x10", Malformed),
            ("\u{661}", Malformed),
            ("1\u{20ac}", Malformed),
            ("-1", Negative),
            ("-1Mi", Negative),
            ("8Ei", TooLarge),
            ("9223372036854775808", TooLarge),
            ("9223372036854775807.1", TooLarge),
            ("1e19", TooLarge),
            ("1e99999999999", TooLarge),
            ("1.0000000000000000001", TooFine),
        ] {
            assert_eq!(Quantity::parse(text), Err(error), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_answered_without_a_panic(text in "\\PC{0,140}") {
            let _answer = Quantity::parse(&text);
        }

        #[test]
        fn texts_that_look_like_quantities_do_not_panic(text in "[-+]?[0-9.]{0,45}[eEnumkMGTPi]{0,2}[-+]?[0-9]{0,12}") {
            let _answer = Quantity::parse(&text);
        }

        #[test]
        fn whole_numbers_are_themselves(n in 0..=i64::MAX.unsigned_abs()) {
            prop_assert_eq!(units(&n.to_string()), n);
        }

        #[test]
        fn millis_and_decimals_agree(n in 0_u64..1_000_000_000) {
            let decimal = format!("{}.{:03}", n / 1000, n % 1000);
            prop_assert_eq!(millis(&decimal), n);
            prop_assert_eq!(millis(&format!("{n}m")), n);
            prop_assert_eq!(millis(&format!("{n}e-3")), n);
        }

        #[test]
        fn binary_suffixes_are_powers_of_1024(n in 0_u64..8) {
            for (power, suffix) in (1_u32..).zip(["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]) {
                prop_assert_eq!(units(&format!("{n}{suffix}")), n * 1024_u64.pow(power));
            }
        }

        #[test]
        fn order_is_kept(a in 0_u64..1_000_000, b in 0_u64..1_000_000) {
            let of = |n: u64| Quantity::parse(&format!("{n}Ki")).unwrap();
            prop_assert_eq!(of(a).cmp(&of(b)), a.cmp(&b));
        }
    }
}
