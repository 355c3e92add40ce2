//! Forms: parts by their names, as the tree that JSON would be.
//!
//! Which of the texts is a number is not the form's to say but the body's: they stay [`Value::Part`]. Names of lists and
//! objects are spelled in several ways by the clients of OpenAI's API, and all of them are read: `a[]`, `a[0]`, `a.0`, `a[b]`,
//! `a.b`, and any of these behind each other. Of `a[][b]` a new element begins where the last one has its `b`.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart, Request};
use axum::http::header;

use super::value::{MAX_NAME_BYTES, Object, Value};
use crate::http::error::ApiError;

/// Most steps of a part's name.
const MAX_STEPS: usize = 8;
/// Most parts of a form: every field that there is, with the elements of its lists.
const MAX_PARTS: usize = 256;

/// The parts of a form that is in memory. `content_type` has its boundary.
pub(super) fn read(form: Bytes, content_type: String) -> Result<Value, ApiError> {
    let request = Request::builder().header(header::CONTENT_TYPE, content_type).body(Body::from(form));
    let mut request = request.map_err(|_| unreadable())?;
    // Its bytes have been counted.
    DefaultBodyLimit::disable().apply(&mut request);
    // The reader is made for forms that arrive; of one that is there it waits for nothing.
    match pin!(read_parts(request)).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(fields) => Ok(Value::Object(fields?)),
        Poll::Pending => Err(unreadable()),
    }
}

fn unreadable() -> ApiError {
    ApiError::malformed("the form cannot be read")
}

async fn read_parts(request: Request) -> Result<Object, ApiError> {
    let mut form =
        Multipart::from_request(request, &()).await.map_err(|_| ApiError::malformed("the form has no boundary"))?;
    let mut fields = Object::new();
    let mut parts = 0;
    while let Some(part) = form.next_field().await.map_err(|_| unreadable())? {
        parts += 1;
        if parts > MAX_PARTS {
            return Err(ApiError::malformed(format!("the form has more than {MAX_PARTS} parts")));
        }
        let Some(name) = part.name().map(str::to_owned) else {
            return Err(ApiError::malformed("a part of the form has no name"));
        };
        if name.len() > MAX_NAME_BYTES {
            let problem = format!("a part of the form has a name of more than {MAX_NAME_BYTES} bytes");
            return Err(ApiError::malformed(problem));
        }
        let is_file = part.file_name().is_some();
        let bytes = Vec::from(part.bytes().await.map_err(|_| unreadable())?);
        let value = match is_file {
            true => Value::File(bytes),
            false => Value::Part(String::from_utf8(bytes).map_err(|_| ApiError::field(&name, "is not UTF-8 text"))?),
        };
        insert(&mut fields, &name, value)?;
    }
    Ok(fields)
}

/// One step of a part's name.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Step<'a> {
    Key(&'a str),
    Index(usize),
    /// The element that comes next.
    Next,
}

impl<'a> Step<'a> {
    fn new(text: &'a str) -> Self {
        match text.parse() {
            _ if text.is_empty() => Self::Next,
            Ok(index) => Self::Index(index),
            Err(_) => Self::Key(text),
        }
    }
}

/// `a[0].b` is a, 0 and b. A name that is not spelled like this is one key, which nobody will know.
fn steps(name: &str) -> Vec<Step<'_>> {
    let first_len = name.find(['[', '.']).unwrap_or(name.len());
    let (first, mut rest) = name.split_at(first_len);
    let mut steps = vec![Step::Key(first)];
    while !rest.is_empty() {
        let (step, after) = match rest.strip_prefix('.') {
            Some(rest) => rest.split_at(rest.find(['[', '.']).unwrap_or(rest.len())),
            None => match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
                Some(split) => split,
                None => return vec![Step::Key(name)],
            },
        };
        steps.push(Step::new(step));
        rest = after;
    }
    steps
}

fn insert(fields: &mut Object, name: &str, value: Value) -> Result<(), ApiError> {
    let steps = steps(name);
    if steps.len() > MAX_STEPS {
        return Err(ApiError::field(name, format!("goes deeper than {MAX_STEPS} steps")));
    }
    let Some((Step::Key(first), rest)) = steps.split_first() else {
        return Err(ApiError::malformed("a part of the form has no name"));
    };
    let problem = match fields.get_mut(*first) {
        None => {
            fields.insert((*first).to_owned(), fresh(rest, value).map_err(|problem| ApiError::field(name, problem))?);
            return Ok(());
        }
        Some(place) => put(place, rest, value),
    };
    problem.map_err(|problem| ApiError::field(name, problem))
}

/// A value that holds nothing but `value`, that many steps inside.
fn fresh(steps: &[Step<'_>], value: Value) -> Result<Value, &'static str> {
    Ok(match steps.split_first() {
        None => value,
        Some((Step::Key(key), rest)) => Value::Object(Object::from([((*key).to_owned(), fresh(rest, value)?)])),
        Some((Step::Index(0) | Step::Next, rest)) => Value::List(vec![fresh(rest, value)?]),
        Some((Step::Index(_), _)) => return Err(SKIPS),
    })
}

const SKIPS: &str = "skips elements of its list";
const TWICE: &str = "is given twice";

/// Adds `value` to what is in its place already.
fn put(place: &mut Value, steps: &[Step<'_>], value: Value) -> Result<(), &'static str> {
    let Some((step, rest)) = steps.split_first() else { return Err(TWICE) };
    match (step, place) {
        (Step::Key(key), Value::Object(fields)) => match fields.get_mut(*key) {
            Some(place) => return put(place, rest, value),
            None => {
                fields.insert((*key).to_owned(), fresh(rest, value)?);
            }
        },
        (Step::Index(index), Value::List(values)) if *index == values.len() => values.push(fresh(rest, value)?),
        (Step::Index(index), Value::List(values)) => {
            return put(values.get_mut(*index).ok_or(SKIPS)?, rest, value);
        }
        (Step::Next, Value::List(values)) => match values.last_mut() {
            Some(last) if has_room(last, rest) => return put(last, rest, value),
            _ => values.push(fresh(rest, value)?),
        },
        _ => return Err(TWICE),
    }
    Ok(())
}

/// Whether a value can be put that many steps inside of `place`.
fn has_room(place: &Value, steps: &[Step<'_>]) -> bool {
    let Some((step, rest)) = steps.split_first() else { return false };
    let inner = match (step, place) {
        (Step::Key(key), Value::Object(fields)) => fields.get(*key),
        (Step::Index(index), Value::List(values)) if *index <= values.len() => values.get(*index),
        (Step::Next, Value::List(_)) => None,
        _ => return false,
    };
    inner.is_none_or(|inner| has_room(inner, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tree as JSON of the parts' texts.
    fn tree(parts: &[(&str, &str)]) -> Result<String, String> {
        let mut fields = Object::new();
        for (name, text) in parts {
            let inserted = insert(&mut fields, name, Value::Part((*text).to_owned()));
            inserted.map_err(|error| serde_json::to_value(error.body()).expect("serializes")["message"].to_string())?;
        }
        fn show(value: &Value) -> serde_json::Value {
            match value {
                Value::Part(text) => text.clone().into(),
                Value::List(values) => values.iter().map(show).collect(),
                Value::Object(fields) => fields.iter().map(|(key, value)| (key.clone(), show(value))).collect(),
                other => panic!("{other:?}"),
            }
        }
        Ok(show(&Value::Object(fields)).to_string())
    }

    #[test]
    fn every_spelling_of_a_list_of_objects_is_the_same_list() {
        let expected = Ok(r#"{"loras":[{"name":"x","weight":"1"},{"name":"y"}]}"#.to_owned());
        for [first, weight, second] in [
            ["loras[][name]", "loras[][weight]", "loras[][name]"],
            ["loras[].name", "loras[].weight", "loras[].name"],
            ["loras[0][name]", "loras[0][weight]", "loras[1][name]"],
            ["loras[0].name", "loras[0].weight", "loras[1].name"],
            ["loras.0.name", "loras.0.weight", "loras.1.name"],
        ] {
            assert_eq!(tree(&[(first, "x"), (weight, "1"), (second, "y")]), expected, "{first}");
        }
    }

    #[test]
    fn lists_and_objects_nest() {
        assert_eq!(tree(&[("a[]", "0"), ("a[]", "1")]), Ok(r#"{"a":["0","1"]}"#.into()));
        assert_eq!(tree(&[("a[0]", "0"), ("a[1]", "1")]), Ok(r#"{"a":["0","1"]}"#.into()));
        assert_eq!(tree(&[("a[b]", "0"), ("a.c", "1")]), Ok(r#"{"a":{"b":"0","c":"1"}}"#.into()));
        let nested = [("a[][b][]", "0"), ("a[][b][]", "1"), ("a[][c]", "2"), ("a[][c]", "3")];
        assert_eq!(tree(&nested), Ok(r#"{"a":[{"b":["0","1"],"c":"2"},{"c":"3"}]}"#.into()));
        assert_eq!(tree(&[("a[b", "0")]), Ok(r#"{"a[b":"0"}"#.into()));
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let wrong = |parts: &[(&str, &str)]| tree(parts).expect_err("contradicts itself");
        assert_eq!(wrong(&[("a", "0"), ("a", "1")]), "\"a: is given twice\"");
        assert_eq!(wrong(&[("a", "0"), ("a[]", "1")]), "\"a[]: is given twice\"");
        assert_eq!(wrong(&[("a[]", "0"), ("a", "1")]), "\"a: is given twice\"");
        assert_eq!(wrong(&[("a[b]", "0"), ("a[b]", "1")]), "\"a[b]: is given twice\"");
        assert_eq!(wrong(&[("a[1]", "0")]), "\"a[1]: skips elements of its list\"");
        assert!(wrong(&[(&format!("a{}", "[]".repeat(9)), "0")]).contains("goes deeper than 8 steps"));
    }

    #[test]
    fn parts_and_their_names_are_bounded() {
        let form = |names: &[String]| {
            let part = |name: &String| format!("--b\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n0\r\n");
            let form = names.iter().map(part).collect::<String>() + "--b--\r\n";
            read(form.into(), "multipart/form-data; boundary=b".to_owned()).map_err(|error| {
                serde_json::to_value(error.body()).expect("serializes")["message"].as_str().expect("text").to_owned()
            })
        };
        let names: Vec<String> = (0..=MAX_PARTS).map(|number| format!("f{number}")).collect();
        assert!(form(&names[1..]).is_ok());
        assert_eq!(form(&names), Err("the form has more than 256 parts".to_owned()));
        assert!(form(&["n".repeat(MAX_NAME_BYTES)]).is_ok());
        let problem = "a part of the form has a name of more than 128 bytes";
        assert_eq!(form(&["n".repeat(MAX_NAME_BYTES + 1)]), Err(problem.to_owned()));
    }
}
