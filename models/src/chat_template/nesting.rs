//! How deep a template's source may be nested.
//!
//! Owns: bounds on what minijinja's parser and compiler call themselves for once per token, and do not bound: chains of
//! operators, attributes, calls and filters in one tag, and chains of `elif`. Brackets and blocks in each other it bounds
//! itself, at 150. Deliberately does not know: what a token means.

use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Error, ErrorKind};

/// Most operators, attributes, subscripts, calls, filters and tests in one tag. Long conditions of published templates have
/// some dozens.
const MAX_OPERATORS: usize = 1000;
/// Most `elif` in one template.
const MAX_ELIFS: usize = 1000;

/// Whether a source can be parsed and compiled on a bounded stack.
pub(super) fn check(source: &str, syntax: &SyntaxConfig) -> Result<(), Error> {
    let (mut operators, mut elifs) = (0, 0);
    let mut begins_block = false;
    for token in tokenize(source, false, syntax.clone()) {
        // What is no token fails when the template is parsed.
        let Ok((token, span)) = token else { break };
        match token {
            Token::VariableStart | Token::BlockStart => operators = 0,
            Token::Ident("elif") if begins_block => elifs += 1,
            _ => operators += usize::from(is_operator(&token)),
        }
        begins_block = matches!(token, Token::BlockStart);
        let too_much = match (operators > MAX_OPERATORS, elifs > MAX_ELIFS) {
            (true, _) => format!("line {}: a tag has more than {MAX_OPERATORS} operators", span.start_line),
            (_, true) => format!("line {}: there are more than {MAX_ELIFS} `elif`", span.start_line),
            _ => continue,
        };
        return Err(Error::new(ErrorKind::SyntaxError, too_much));
    }
    Ok(())
}

/// Whether the parser or the compiler goes one call deeper for a token.
fn is_operator(token: &Token) -> bool {
    matches!(
        token,
        Token::Plus
            | Token::Minus
            | Token::Mul
            | Token::Div
            | Token::FloorDiv
            | Token::Mod
            | Token::Pow
            | Token::Tilde
            | Token::Pipe
            | Token::Dot
            | Token::BracketOpen
            | Token::ParenOpen
            | Token::Ident("and" | "or" | "not" | "if" | "else" | "is" | "in")
    )
}
