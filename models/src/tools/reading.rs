//! Calls in the text of an answer, as it comes.
//!
//! Owns: telling text from calls, and the arguments of a call as they come. An answer that is held to a grammar of calls has
//! no others than those read here; what is none after all is text. Does not know: tokens.

use super::format::{Parts, ToolFormat};

/// What a new piece of text says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// Text outside of calls.
    Text(String),
    /// A call of this function begins.
    Call(String),
    /// More of the arguments of the call that began last.
    Arguments(String),
    /// It is whole.
    End,
}

/// Reads one answer.
#[derive(Debug)]
pub struct CallReader {
    format: ToolFormat,
    place: Place,
    /// What came and does not yet say what it is.
    held: String,
    /// Calls that were whole.
    calls: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Before a call or text. White space there belongs to neither where a call follows.
    Open,
    /// Within text.
    Text,
    /// Behind a marker.
    Head,
    /// Within arguments, which are an object.
    Arguments(Nesting),
    /// Behind arguments.
    Close,
    /// Within text that no call can follow.
    TextAlone,
}

/// Where a text of JSON is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Nesting {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl Nesting {
    /// Reads one byte; true when the outermost value ended with it.
    fn advance(&mut self, byte: u8) -> bool {
        match (self.in_string, byte) {
            (true, _) if self.is_escaped => self.is_escaped = false,
            (true, b'\\') => self.is_escaped = true,
            (true, b'"') => self.in_string = false,
            (true, _) => (),
            (false, b'"') => self.in_string = true,
            (false, b'{' | b'[') => self.depth += 1,
            (false, b'}' | b']') => self.depth = self.depth.saturating_sub(1),
            (false, _) => (),
        }
        self.depth == 0 && !self.in_string && matches!(byte, b'}' | b']')
    }
}

impl CallReader {
    /// At the beginning of an answer.
    pub fn new(format: ToolFormat) -> Self {
        Self { format, place: Place::Open, held: String::new(), calls: 0 }
    }

    /// Calls that were whole.
    pub fn num_calls(&self) -> usize {
        self.calls
    }

    /// What is certain once `text` came.
    pub fn push(&mut self, text: &str) -> Vec<Said> {
        self.held.push_str(text);
        let mut said = Vec::new();
        while let Some(next) = self.next(&mut said) {
            self.place = next;
        }
        said
    }

    /// What is left when nothing more comes: text that could have been the beginning of a call.
    pub fn finish(&mut self) -> Vec<Said> {
        let held = std::mem::take(&mut self.held);
        let is_text = match self.place {
            Place::Open => self.calls == 0 || !held.trim().is_empty(),
            Place::Text | Place::TextAlone => true,
            // The answer was cut within a call.
            Place::Head | Place::Arguments(_) | Place::Close => false,
        };
        if is_text && !held.is_empty() { vec![Said::Text(held)] } else { Vec::new() }
    }

    /// Reads as far as one place goes; `None` where more text is needed.
    fn next(&mut self, said: &mut Vec<Said>) -> Option<Place> {
        if self.held.is_empty() {
            return None;
        }
        match self.place {
            Place::Open => self.open(),
            Place::Text => self.text(said),
            Place::Head => self.head(said),
            Place::Arguments(nesting) => self.arguments(nesting, said),
            Place::Close => self.close(said),
            Place::TextAlone => {
                said.push(Said::Text(std::mem::take(&mut self.held)));
                None
            }
        }
    }

    fn open(&mut self) -> Option<Place> {
        let Parts { marker, .. } = self.format.parts();
        // Between calls stand white space and, of Llama, semicolons.
        let separators: &[char] = if self.calls > 0 { &[' ', '\n', ';'] } else { &[' ', '\n'] };
        let begins = self.held.trim_start_matches(separators);
        if let Some(rest) = begins.strip_prefix(marker) {
            self.held = rest.to_owned();
            return Some(Place::Head);
        }
        if marker.starts_with(begins) {
            return None;
        }
        Some(if self.format == ToolFormat::Llama3 { Place::TextAlone } else { Place::Text })
    }

    fn text(&mut self, said: &mut Vec<Said>) -> Option<Place> {
        let Parts { marker, .. } = self.format.parts();
        if let Some(at) = self.held.find(marker) {
            let rest = self.held.split_off(at + marker.len());
            let text = std::mem::replace(&mut self.held, rest);
            let text = text[..at].trim_end_matches('\n');
            said.extend((!text.is_empty()).then(|| Said::Text(text.to_owned())));
            return Some(Place::Head);
        }
        // What may be a marker, or the line feeds before one, waits.
        let open = (1..marker.len()).rev().find(|length| self.held.ends_with(&marker[..*length])).unwrap_or(0);
        let certain = self.held[..self.held.len() - open].trim_end_matches('\n').len();
        let rest = self.held.split_off(certain);
        let text = std::mem::replace(&mut self.held, rest);
        said.extend((!text.is_empty()).then_some(Said::Text(text)));
        None
    }

    fn head(&mut self, said: &mut Vec<Said>) -> Option<Place> {
        let Parts { marker, before_name, before_arguments, .. } = self.format.parts();
        let head = Head::of(&self.held, before_name, before_arguments);
        match head {
            Head::Whole { name, length } => {
                said.push(Said::Call(name));
                self.held.drain(..length);
                Some(Place::Arguments(Nesting::default()))
            }
            Head::Unfinished => None,
            Head::Other => {
                self.held.insert_str(0, marker);
                Some(Place::TextAlone)
            }
        }
    }

    fn arguments(&mut self, mut nesting: Nesting, said: &mut Vec<Said>) -> Option<Place> {
        let end = self.held.bytes().position(|byte| nesting.advance(byte));
        let rest = self.held.split_off(end.map_or(self.held.len(), |end| end + 1));
        said.push(Said::Arguments(std::mem::replace(&mut self.held, rest)));
        match end {
            Some(_) => Some(Place::Close),
            None => {
                self.place = Place::Arguments(nesting);
                None
            }
        }
    }

    fn close(&mut self, said: &mut Vec<Said>) -> Option<Place> {
        let Parts { close, .. } = self.format.parts();
        if let Some(rest) = self.held.strip_prefix(close) {
            self.held = rest.to_owned();
            self.calls += 1;
            said.push(Said::End);
            return Some(Place::Open);
        }
        if close.starts_with(&self.held) { None } else { Some(Place::TextAlone) }
    }
}

/// What stands behind a marker.
enum Head {
    Whole {
        name: String,
        length: usize,
    },
    Unfinished,
    /// No call.
    Other,
}

impl Head {
    fn of(text: &str, before_name: &str, before_arguments: &str) -> Self {
        let Some(rest) = text.strip_prefix(before_name) else {
            return if before_name.starts_with(text) { Self::Unfinished } else { Self::Other };
        };
        let Some(end) = rest.find('"') else { return Self::Unfinished };
        let (name, rest) = rest.split_at(end);
        if !rest.starts_with(before_arguments) {
            return if before_arguments.starts_with(rest) { Self::Unfinished } else { Self::Other };
        }
        Self::Whole { name: name.to_owned(), length: before_name.len() + name.len() + before_arguments.len() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said of a text that comes in pieces of so many characters, pieces of one kind joined.
    fn read(format: ToolFormat, text: &str, size: usize) -> Vec<Said> {
        let mut reader = CallReader::new(format);
        let characters: Vec<char> = text.chars().collect();
        let mut all: Vec<Said> = Vec::new();
        let pieces = characters.chunks(size).map(|piece| piece.iter().collect::<String>());
        let mut said: Vec<Said> = pieces.flat_map(|piece| reader.push(&piece)).collect();
        said.extend(reader.finish());
        for next in said {
            match (all.last_mut(), next) {
                (Some(Said::Text(text)), Said::Text(more)) => text.push_str(&more),
                (Some(Said::Arguments(text)), Said::Arguments(more)) => text.push_str(&more),
                (_, next) => all.push(next),
            }
        }
        all
    }

    #[track_caller]
    fn check(format: ToolFormat, text: &str, expected: &[Said]) {
        for size in [1, 2, 3, 7, 1000] {
            assert_eq!(read(format, text, size), expected, "{text} in pieces of {size}");
        }
    }

    fn text(text: &str) -> Said {
        Said::Text(text.to_owned())
    }

    fn call(name: &str, arguments: &str) -> [Said; 3] {
        [Said::Call(name.to_owned()), Said::Arguments(arguments.to_owned()), Said::End]
    }

    #[test]
    fn calls_of_hermes_stand_between_marks() {
        let format = ToolFormat::Hermes;
        let tricky = r#"{"a": {"b": ["}\"", 1]}, "c": "<tool_call>"}"#;
        let first = format!("<tool_call>\n{{\"name\": \"f\", \"arguments\": {tricky}}}\n</tool_call>");
        let second = "<tool_call>\n{\"name\": \"g-2\", \"arguments\": {}}\n</tool_call>";
        check(format, &first, &call("f", tricky));
        check(format, &format!("{first}\n{second}"), &[call("f", tricky), call("g-2", "{}")].concat());
        check(format, &format!("I look.\n\n{second}"), &[vec![text("I look.")], call("g-2", "{}").to_vec()].concat());
        check(format, "no <tool_ca call\n", &[text("no <tool_ca call\n")]);
        check(format, " plain", &[text(" plain")]);
        check(format, "a <tool_call> b", &[text("a <tool_call> b")]);
        check(format, "", &[]);
        // Cut within a call.
        let cut = &first[..first.len() - 30];
        assert!(matches!(&read(format, cut, 5)[..], [Said::Call(_), Said::Arguments(_)]));
        check(format, "<tool_call>\n{\"na", &[]);
    }

    #[test]
    fn calls_of_llama_are_the_whole_answer() {
        let format = ToolFormat::Llama3;
        check(format, r#"{"name": "f", "parameters": {"x": "}"}}"#, &call("f", r#"{"x": "}"}"#));
        let two = r#"{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"y": 1}}"#;
        check(format, two, &[call("f", "{}"), call("g", r#"{"y": 1}"#)].concat());
        check(format, r#"Say {"name": "f"}"#, &[text(r#"Say {"name": "f"}"#)]);
        check(format, r#"{"other": 1}"#, &[text(r#"{"other": 1}"#)]);
    }
}
