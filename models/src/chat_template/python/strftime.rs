//! `datetime.strftime` as Python has it on Linux: the directives of glibc in the C locale, and Python's own `%f`.

use jiff::civil::{DateTime, Weekday};

use super::{Result, bounded};
use crate::chat_template::budget::charge;

/// How glibc pads a field unless a flag says otherwise.
#[derive(Clone, Copy)]
enum Padding {
    Zeros(usize),
    Spaces(usize),
    None,
}

/// `time` in a format of `strftime`. Directives that glibc does not know are written as they are.
///
/// The time is naive as `datetime.now()` is: `%z` and `%Z` are empty. `%s` counts seconds from 1970 as if it were UTC,
/// unless `epoch` says them.
pub fn strftime(format: &str, time: DateTime, epoch: Option<i64>) -> Result<String> {
    let epoch = epoch.unwrap_or_else(|| time.duration_since(jiff::civil::date(1970, 1, 1).at(0, 0, 0, 0)).as_secs());
    let mut out = String::new();
    let mut rest = format;
    while let Some(start) = rest.find('%') {
        out.push_str(&rest[..start]);
        let (directive, conversion) = Directive::parse(&rest[start..])?;
        // Python knows `%f` by itself and without flags; glibc does not know it.
        let known = conversion.filter(|conversion| *conversion != 'f' || directive.len == 2);
        match known.and_then(|conversion| field(conversion, time, epoch)) {
            Some((text, padding)) => {
                let text = directive.apply(text, padding);
                charge(text.len())?;
                out.push_str(&text);
            }
            None => out.push_str(&rest[start..start + directive.len]),
        }
        rest = &rest[start + directive.len..];
    }
    Ok(out + rest)
}

/// What stands between `%` and the letter.
struct Directive {
    flag: Option<char>,
    upper: bool,
    width: Option<usize>,
    /// Bytes of the whole directive.
    len: usize,
}

impl Directive {
    /// The directive at the start of `text`, and its letter if the text does not end before it.
    fn parse(text: &str) -> Result<(Self, Option<char>)> {
        let mut directive = Self { flag: None, upper: false, width: None, len: 1 };
        let mut chars = text[1..].chars().peekable();
        while let Some(flag) = chars.next_if(|c| matches!(c, '-' | '_' | '0' | '^' | '#')) {
            match flag {
                '^' | '#' => directive.upper = true,
                flag => directive.flag = Some(flag),
            }
            directive.len += 1;
        }
        let mut width = 0;
        while let Some(digit) = chars.next_if(char::is_ascii_digit) {
            width = bounded(width as u64 * 10 + u64::from(digit) - u64::from('0'))?;
            directive.width = Some(width);
            directive.len += 1;
        }
        if chars.next_if(|c| matches!(c, 'E' | 'O')).is_some() {
            directive.len += 1;
        }
        let conversion = chars.next();
        directive.len += conversion.map_or(0, char::len_utf8);
        // `#` swaps the case, which is upper for `%p` alone.
        let swapped = conversion == Some('p') && text[1..directive.len].contains('#');
        directive.upper &= !swapped;
        Ok((directive, if swapped { Some('P') } else { conversion }))
    }

    fn apply(&self, text: String, padding: Padding) -> String {
        let (fill, usual) = match padding {
            Padding::Zeros(width) => ('0', width),
            Padding::Spaces(width) => (' ', width),
            Padding::None => (' ', 0),
        };
        let fill = match self.flag {
            Some('_') => ' ',
            Some('0') => '0',
            _ => fill,
        };
        let width = if self.flag == Some('-') { 0 } else { self.width.unwrap_or(usual) };
        let text = if self.upper { text.to_uppercase() } else { text };
        let missing = width.saturating_sub(text.chars().count());
        fill.to_string().repeat(missing) + &text
    }
}

/// The text of a field without padding.
fn field(conversion: char, time: DateTime, epoch: i64) -> Option<(String, Padding)> {
    use Padding::{None as Plain, Spaces, Zeros};
    let number = |number: i64, padding: Padding| Some((number.to_string(), padding));
    let text = |text: &str| Some((text.to_owned(), Plain));
    let composed = |format: &str| Some((strftime(format, time, Some(epoch)).ok()?, Plain));
    let (hour, year) = (i64::from(time.hour()), i64::from(time.year()));
    let hour_of_12 = (hour + 11) % 12 + 1;
    let week = time.date().iso_week_date();
    match conversion {
        'a' => text(&day_name(time.weekday())[..3]),
        'A' => text(day_name(time.weekday())),
        'b' | 'h' => text(&month_name(time.month())[..3]),
        'B' => text(month_name(time.month())),
        'c' => composed("%a %b %e %H:%M:%S %Y"),
        'C' => number(year.div_euclid(100), Zeros(2)),
        'd' => number(time.day().into(), Zeros(2)),
        'D' | 'x' => composed("%m/%d/%y"),
        'e' => number(time.day().into(), Spaces(2)),
        'f' => number(i64::from(time.subsec_nanosecond()) / 1000, Zeros(6)),
        'F' => composed("%Y-%m-%d"),
        'g' => number(i64::from(week.year()).rem_euclid(100), Zeros(2)),
        'G' => number(week.year().into(), Zeros(1)),
        'H' => number(hour, Zeros(2)),
        'I' => number(hour_of_12, Zeros(2)),
        'j' => number(time.day_of_year().into(), Zeros(3)),
        'k' => number(hour, Spaces(2)),
        'l' => number(hour_of_12, Spaces(2)),
        'm' => number(time.month().into(), Zeros(2)),
        'M' => number(time.minute().into(), Zeros(2)),
        'n' => text("\n"),
        'p' => text(if hour < 12 { "AM" } else { "PM" }),
        'P' => text(if hour < 12 { "am" } else { "pm" }),
        'r' => composed("%I:%M:%S %p"),
        'R' => composed("%H:%M"),
        's' => number(epoch, Zeros(1)),
        'S' => number(time.second().into(), Zeros(2)),
        't' => text("\t"),
        'T' | 'X' => composed("%H:%M:%S"),
        'u' => number(time.weekday().to_monday_one_offset().into(), Zeros(1)),
        'U' => number(week_of_year(time, time.weekday().to_sunday_zero_offset()), Zeros(2)),
        'V' => number(week.week().into(), Zeros(2)),
        'w' => number(time.weekday().to_sunday_zero_offset().into(), Zeros(1)),
        'W' => number(week_of_year(time, time.weekday().to_monday_zero_offset()), Zeros(2)),
        'y' => number(year.rem_euclid(100), Zeros(2)),
        'Y' => number(year, Zeros(1)),
        'z' | 'Z' => text(""),
        '%' => text("%"),
        _ => None,
    }
}

/// Weeks that began since the first of January, where today is `weekday` days after the beginning of its week.
fn week_of_year(time: DateTime, weekday: i8) -> i64 {
    (i64::from(time.day_of_year()) + 6 - i64::from(weekday)) / 7
}

fn day_name(day: Weekday) -> &'static str {
    match day {
        Weekday::Monday => "Monday",
        Weekday::Tuesday => "Tuesday",
        Weekday::Wednesday => "Wednesday",
        Weekday::Thursday => "Thursday",
        Weekday::Friday => "Friday",
        Weekday::Saturday => "Saturday",
        Weekday::Sunday => "Sunday",
    }
}

fn month_name(month: i8) -> &'static str {
    const NAMES: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    NAMES[month as usize - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Python 3.11 answers on Linux.
    #[test]
    fn directives_are_those_of_python() {
        let time = jiff::civil::date(2026, 1, 5).at(7, 8, 9, 123_456);
        let check = |format: &str, expected: &str| {
            assert_eq!(strftime(format, time, None).expect("formats"), expected, "{format}");
        };
        check("%a %A %b %B %h", "Mon Monday Jan January Jan");
        check(
            "%c|%x|%X|%D|%F|%r|%R|%T",
            "Mon Jan  5 07:08:09 2026|01/05/26|07:08:09|01/05/26|2026-01-05|07:08:09 AM|07:08|07:08:09",
        );
        check("%C %d %e %g %G %H %I %j %k %l %m %M", "20 05  5 26 2026 07 07 005  7  7 01 08");
        check("%p %P %s %S %u %U %V %w %W %y %Y", "AM am 1767596889 09 1 01 02 1 01 26 2026");
        check("%f", "000123");
        check("[%z][%Z][%n][%t][%%]", "[][][\n][\t][%]");
        check("%v %E %O %+ %q %é %", "%v %E %O %+ %q %é %");
        check("%-d %_d %Ey %Od %^a %#Z %10Y %-I %05d %_m", "5  5 26 05 MON  0000002026 7 00005  1");
    }

    #[test]
    fn weeks_are_those_of_python_at_the_ends_of_years() {
        for (year, month, day, expected) in [
            (2027, 1, 1, "00 00 53 2026 26 001 5 5"),
            (2024, 12, 30, "52 53 01 2025 25 365 1 1"),
            (2023, 1, 1, "01 00 52 2022 22 001 7 0"),
            (2023, 12, 31, "53 52 52 2023 23 365 7 0"),
        ] {
            let time = jiff::civil::date(year, month, day).at(0, 0, 0, 0);
            assert_eq!(strftime("%U %W %V %G %g %j %u %w", time, None).expect("formats"), expected);
        }
    }
}
