//! LVM's volume groups: physical volumes that name each other, and linear and striped volumes on them.
//!
//! What a group is stands on its physical volumes as text (lvm.conf(5)'s form). Each has a copy; the newest counts.

use crate::disk::{Fault, Section, u32_at, u64_at};
use crate::map::{Map, Part};
use crc_fast::{CrcAlgorithm, Digest};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

const SECTOR: u64 = 512;
const LABEL: &[u8; 8] = b"LABELONE";
const KIND: &[u8; 8] = b"LVM2 001";
const AREA_MAGIC: &[u8; 16] = b" LVM2 x[5A%r0N*>";
const UUID: usize = 32;
const CRC_START: u32 = 0xf597_a6cf;
/// Bytes of a group's text.
const LONGEST_TEXT: u64 = 16 << 20;
const DEEPEST: usize = 8;
const MOST_SEGMENTS: usize = 10_000;

/// A physical volume.
#[derive(Debug)]
pub struct Physical {
    uuid: Vec<u8>,
    /// Of the disks, counted as one.
    start: u64,
    len: u64,
    /// Its copy of the group, if it has one.
    text: Option<String>,
}

#[cfg(any(test, feature = "fuzzing"))]
impl Physical {
    /// One of `len` bytes that begins at 0 and says this of its group.
    pub fn saying(text: String, len: u64) -> Physical {
        Physical { uuid: vec![b'a'; UUID], start: 0, len, text: Some(text) }
    }
}

/// A logical volume.
#[derive(Debug)]
pub struct Logical {
    /// As the device mapper has it.
    pub name: String,
    /// Where it lies, or why it is not shown.
    pub map: Result<Map, String>,
    /// What another volume shows is made of it too, as that of a snapshot is of its origin: what it does not need itself may
    /// be needed there.
    pub is_shared: bool,
}

fn crc(bytes: &[u8]) -> u32 {
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32IsoHdlc, CRC_START.into());
    digest.update(bytes);
    !(digest.finalize() as u32)
}

/// What a part of a disk is, if it is a physical volume. `start` is where it begins.
pub fn physical(section: Section<'_>, start: u64) -> Result<Option<Physical>, Fault> {
    const DAMAGED: Fault = Fault::Damaged("a physical volume of LVM that is damaged");
    for sector in 0..4 {
        if section.len() < (sector + 1) * SECTOR {
            break;
        }
        let label = section.read_array::<{ SECTOR as usize }>(sector * SECTOR)?;
        if label[..8] != *LABEL || label[24..32] != *KIND {
            continue;
        }
        let header = u32_at(&label, 20) as usize;
        if crc(&label[20..]) != u32_at(&label, 16) || header + UUID + 8 > label.len() {
            return Err(DAMAGED);
        }
        let uuid = label[header..header + UUID].to_vec();
        // Two lists of places, of data and of texts, each with an empty one at its end.
        let places =
            label[header + UUID + 8..].chunks_exact(16).map(|place| (u64_at(place, 0), u64_at(place, 8)));
        let texts = places.skip_while(|place| *place != (0, 0)).skip(1).take_while(|place| *place != (0, 0));
        let mut text = None;
        for (at, len) in texts {
            text = text.or(area(section, at, len)?);
        }
        return Ok(Some(Physical { uuid, start, len: section.len(), text }));
    }
    Ok(None)
}

/// The text in an area; none if it holds none.
fn area(section: Section<'_>, at: u64, len: u64) -> Result<Option<String>, Fault> {
    const DAMAGED: Fault = Fault::Damaged("a physical volume of LVM whose group is damaged");
    let header = section.read_array::<{ SECTOR as usize }>(at)?;
    if header[4..20] != *AREA_MAGIC || crc(&header[4..]) != u32_at(&header, 0) {
        return Err(DAMAGED);
    }
    let (offset, size, sum) = (u64_at(&header, 40), u64_at(&header, 48), u32_at(&header, 56));
    if size == 0 {
        return Ok(None);
    }
    if size > LONGEST_TEXT || len < SECTOR || size > len - SECTOR || !(SECTOR..len).contains(&offset) {
        return Err(DAMAGED);
    }
    // It goes on at the beginning.
    let first = size.min(len - offset);
    let mut text = section.read_vec(at.checked_add(offset).ok_or(DAMAGED)?, first as usize)?;
    text.extend(section.read_vec(at + SECTOR, (size - first) as usize)?);
    if crc(&text) != sum {
        return Err(DAMAGED);
    }
    while text.last() == Some(&0) {
        text.pop();
    }
    String::from_utf8(text).map(Some).map_err(|_| DAMAGED)
}

/// The visible logical volumes of all groups, on disks of `size` bytes together.
pub fn logical(physical: &[Physical], size: u64) -> Vec<Logical> {
    let mut groups: BTreeMap<String, (i64, String, Settings)> = BTreeMap::new();
    for text in physical.iter().filter_map(|physical| physical.text.as_deref()) {
        let Some((name, group)) = parse(text) else { continue };
        let (Some(id), Some(sequence)) = (group.text("id"), group.number("seqno")) else { continue };
        let newest = groups.get(id).is_none_or(|(known, ..)| *known < sequence);
        if newest {
            groups.insert(id.to_owned(), (sequence, name, group));
        }
    }
    let mut found = Vec::new();
    for (_, name, group) in groups.values() {
        let Some(volumes) = group.section("logical_volumes") else { continue };
        let parts_of_others = named(volumes);
        for (volume, value) in &volumes.0 {
            let Value::Section(value) = value else { continue };
            let is_visible =
                value.list("status").iter().any(|status| *status == Value::Text("VISIBLE".to_owned()));
            if is_visible && is_name(name) && is_name(volume) {
                // As the device mapper writes it.
                let shown = format!("{}-{}", name.replace('-', "--"), volume.replace('-', "--"));
                let is_shared = parts_of_others.contains(volume.as_str());
                found.push(Logical { name: shown, map: map(group, value, physical, size), is_shared });
            }
        }
    }
    found
}

/// All that segments of volumes name: physical volumes, and what they are made of besides.
fn named(volumes: &Settings) -> BTreeSet<&str> {
    fn texts<'t>(value: &'t Value, found: &mut BTreeSet<&'t str>) {
        match value {
            Value::Text(text) => {
                found.insert(text);
            }
            Value::List(values) => values.iter().for_each(|value| texts(value, found)),
            Value::Section(section) => {
                // A volume may be called "striped".
                let others = section.0.iter().filter(|(key, _)| *key != "type");
                others.for_each(|(_, value)| texts(value, found));
            }
            Value::Number(_) => {}
        }
    }
    let mut found = BTreeSet::new();
    let volumes = volumes.0.values().filter_map(|value| match value {
        Value::Section(volume) => Some(volume),
        _ => None,
    });
    let segments =
        volumes.flat_map(|volume| volume.0.values()).filter(|value| matches!(value, Value::Section(_)));
    segments.for_each(|segment| texts(segment, &mut found));
    found
}

fn is_name(name: &str) -> bool {
    (1..=127).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+_.-".contains(&byte))
}

fn map(group: &Settings, volume: &Settings, physical: &[Physical], size: u64) -> Result<Map, String> {
    let damaged = || "a logical volume that makes no sense".to_owned();
    let number = |section: &Settings, key| section.number(key).and_then(|number| u64::try_from(number).ok());
    let extent =
        number(group, "extent_size").and_then(|sectors| sectors.checked_mul(SECTOR)).ok_or_else(damaged)?;
    let segments = number(volume, "segment_count").ok_or_else(damaged)?;
    if segments as usize > MOST_SEGMENTS {
        return Err("a logical volume in too many pieces".to_owned());
    }
    let (mut parts, mut expected) = (Vec::new(), 0);
    for segment in 1..=segments {
        let segment = volume.section(&format!("segment{segment}")).ok_or_else(damaged)?;
        let kind = segment.text("type").unwrap_or_default();
        if kind != "striped" {
            let kind: String = kind.chars().filter(char::is_ascii_graphic).take(40).collect();
            return Err(format!("a logical volume of type {kind}, which is not read here"));
        }
        let (first, count) = (number(segment, "start_extent"), number(segment, "extent_count"));
        let (Some(first), Some(count)) = (first, count) else { return Err(damaged()) };
        if first != expected {
            return Err(damaged());
        }
        expected = first.checked_add(count).ok_or_else(damaged)?;
        let len = count.checked_mul(extent).ok_or_else(damaged)?;
        let legs = segment.list("stripes").chunks_exact(2);
        let on_each = len / (legs.len() as u64).max(1);
        let legs = legs.map(|leg| match leg {
            [Value::Text(name), Value::Number(at)] => {
                place(group, name, extent_of(*at, extent, on_each), physical)
            }
            _ => Err(damaged()),
        });
        let legs = legs.collect::<Result<Vec<u64>, String>>()?;
        let stripe = match legs.len() {
            1 => len,
            _ => number(segment, "stripe_size")
                .and_then(|sectors| sectors.checked_mul(SECTOR))
                .ok_or_else(damaged)?,
        };
        parts.push(Part { len, stripe, legs });
    }
    Map::new(parts, size).ok_or_else(damaged)
}

/// `len` bytes from extent `at` on, of extents of `extent` bytes.
fn extent_of(at: i64, extent: u64, len: u64) -> Option<Range<u64>> {
    let start = u64::try_from(at).ok()?.checked_mul(extent)?;
    Some(start..start.checked_add(len)?)
}

/// Where these bytes of a physical volume's extents lie.
fn place(
    group: &Settings,
    name: &str,
    bytes: Option<Range<u64>>,
    physical: &[Physical],
) -> Result<u64, String> {
    let told = group.section("physical_volumes").and_then(|all| all.section(name));
    let uuid = told.and_then(|told| told.text("id")).map(|id| id.replace('-', "").into_bytes());
    let mut same = physical.iter().filter(|physical| uuid.as_ref() == Some(&physical.uuid));
    let Some(found) = same.next() else {
        return Err("a logical volume with a part on a disk that is not in the point".to_owned());
    };
    if same.next().is_some() {
        return Err("a logical volume with a part on a disk that is there twice".to_owned());
    }
    let first = told.and_then(|told| told.number("pe_start")).and_then(|start| u64::try_from(start).ok());
    let place = first.and_then(|first| first.checked_mul(SECTOR)).zip(bytes).and_then(|(first, bytes)| {
        let end = first.checked_add(bytes.end)?;
        (end <= found.len).then(|| found.start + first + bytes.start)
    });
    place.ok_or_else(|| "a logical volume that makes no sense".to_owned())
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Text(String),
    Number(i64),
    List(Vec<Value>),
    Section(Settings),
}

/// Names and what they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Settings(BTreeMap<String, Value>);

impl Settings {
    fn section(&self, key: &str) -> Option<&Settings> {
        match self.0.get(key)? {
            Value::Section(section) => Some(section),
            _ => None,
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        match self.0.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    fn number(&self, key: &str) -> Option<i64> {
        match self.0.get(key)? {
            Value::Number(number) => Some(*number),
            _ => None,
        }
    }

    fn list(&self, key: &str) -> &[Value] {
        match self.0.get(key) {
            Some(Value::List(values)) => values,
            _ => &[],
        }
    }
}

/// The group that a text describes, by its name: the one section at the top.
fn parse(text: &str) -> Option<(String, Settings)> {
    let mut parser = Parser { rest: text };
    let top = parser.section(0, false)?;
    let mut sections = top.0.into_iter().filter_map(|(name, value)| match value {
        Value::Section(section) => Some((name, section)),
        _ => None,
    });
    sections.next()
}

struct Parser<'a> {
    rest: &'a str,
}

impl Parser<'_> {
    fn skip_blanks(&mut self) {
        loop {
            self.rest = self.rest.trim_start();
            let Some(comment) = self.rest.strip_prefix('#') else { return };
            self.rest = comment.find('\n').map_or("", |end| &comment[end..]);
        }
    }

    fn eat(&mut self, sign: char) -> bool {
        self.skip_blanks();
        let found = self.rest.strip_prefix(sign);
        self.rest = found.unwrap_or(self.rest);
        found.is_some()
    }

    /// What is between braces, or all.
    fn section(&mut self, depth: usize, is_braced: bool) -> Option<Settings> {
        let mut section = Settings::default();
        loop {
            self.skip_blanks();
            if is_braced && self.eat('}') || !is_braced && self.rest.is_empty() {
                return Some(section);
            }
            let end = self.rest.find(|c: char| c.is_whitespace() || "={}".contains(c))?;
            let (name, rest) = self.rest.split_at(end);
            self.rest = rest;
            let value = if self.eat('{') {
                if depth == DEEPEST {
                    return None;
                }
                Value::Section(self.section(depth + 1, true)?)
            } else if self.eat('=') {
                self.value()?
            } else {
                return None;
            };
            section.0.insert(name.to_owned(), value);
        }
    }

    fn value(&mut self) -> Option<Value> {
        if !self.eat('[') {
            return self.single();
        }
        let mut values = Vec::new();
        while !self.eat(']') {
            values.push(self.single()?);
            self.eat(',');
        }
        Some(Value::List(values))
    }

    fn single(&mut self) -> Option<Value> {
        if self.eat('"') {
            let mut text = String::new();
            let mut letters = self.rest.char_indices();
            while let Some((at, letter)) = letters.next() {
                match letter {
                    '"' => {
                        self.rest = &self.rest[at + 1..];
                        return Some(Value::Text(text));
                    }
                    '\\' => text.push(letters.next()?.1),
                    _ => text.push(letter),
                }
            }
            return None;
        }
        let end =
            self.rest.find(|c: char| !c.is_ascii_digit() && !"-+.".contains(c)).unwrap_or(self.rest.len());
        let (number, rest) = self.rest.split_at(end);
        self.rest = rest;
        number.parse().ok().map(Value::Number)
    }
}
