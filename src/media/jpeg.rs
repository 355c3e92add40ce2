//! What a JPEG's markers say before it is decoded: how many colours it has, and whether it is whole.
//!
//! The decoder fills what is missing of a file that ends early with grey. Here a file is whole where its markers lead to
//! the end of the image, as for PIL ("image file is truncated"); what comes after that belongs to others.

/// Colour components of the frame, if a header names them before the picture begins.
pub(super) fn components(bytes: &[u8]) -> Option<u8> {
    for segment in Segments::of(bytes) {
        match segment {
            // Precision, height and width come before the number of components.
            Segment::Header { marker: 0xc0..=0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf, data } => {
                return data.get(5).copied();
            }
            Segment::Header { marker: SCAN, .. } | Segment::End => return None,
            Segment::Header { .. } => (),
        }
    }
    None
}

/// Whether the end of the image is there.
pub(super) fn is_whole(bytes: &[u8]) -> bool {
    Segments::of(bytes).any(|segment| matches!(segment, Segment::End))
}

/// Start of a scan: after its header come coded values, in which 0xff is followed by 0 or by a restart marker.
const SCAN: u8 = 0xda;

/// What is between two markers.
enum Segment<'a> {
    /// What its length counts, without the length.
    Header { marker: u8, data: &'a [u8] },
    /// End of the image.
    End,
}

/// The segments of a file up to the end of the image, or to where the file ends.
struct Segments<'a> {
    rest: &'a [u8],
}

impl<'a> Segments<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next marker, past everything that is none, as libjpeg's `next_marker` finds it.
    fn marker(&mut self) -> Option<u8> {
        loop {
            let start = self.rest.iter().position(|byte| *byte == 0xff)?;
            self.rest = &self.rest[start..];
            let end = self.rest.iter().position(|byte| *byte != 0xff)?;
            let marker = self.rest[end];
            self.rest = &self.rest[end + 1..];
            // 0 is an escaped 0xff of coded values.
            if marker != 0 {
                return Some(marker);
            }
        }
    }
}

impl<'a> Iterator for Segments<'a> {
    type Item = Segment<'a>;

    fn next(&mut self) -> Option<Segment<'a>> {
        loop {
            match self.marker()? {
                // Restarts, the start of the image and a temporary marker stand alone.
                0xd0..=0xd8 | 0x01 => (),
                0xd9 => return Some(Segment::End),
                marker => {
                    let (len, after) = self.rest.split_first_chunk()?;
                    let len = usize::from(u16::from_be_bytes(*len)).checked_sub(2)?;
                    let (data, rest) = after.split_at_checked(len)?;
                    self.rest = rest;
                    return Some(Segment::Header { marker, data });
                }
            }
        }
    }
}
