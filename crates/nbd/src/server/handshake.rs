//! From greeting to transmission: the options of the fixed newstyle handshake.

use super::request::Rules;
use super::{ContextIndex, Phase, Progress, Session, SessionError, Step, TlsPolicy};
use crate::ErrorCode;
use crate::export::is_valid_string;
use crate::header::HeaderStyle;
use crate::protocol::{
    EXPORT_NAME_PADDING, IHAVEOPT, MAX_STRING, OPTION_REPLY_MAGIC, handshake_flag, info, option,
    option_reply as reply,
};
use crate::wire::{Fields, u32_at, u64_at};

const OPTION_HEADER_BYTES: usize = 16;
/// An option's data is understood up to this size; longer ones are thrown away and refused.
const MAX_OPTION_BYTES: u32 = 64 * 1024;
/// An option longer than this ends the connection.
const MAX_REFUSED_OPTION_BYTES: u32 = 32 << 20;
/// Queries about contexts, or information requests, in one option.
const MAX_QUERIES: u32 = 64;

/// A refused option: its reply type and what people read.
type Refusal = (u32, &'static str);

impl Session {
    pub(super) fn parse_client_flags(&mut self) -> Result<Progress, SessionError> {
        if self.receive.len() < 4 {
            return Ok(Progress::Incomplete);
        }
        let range = self.receive.consume(4);
        let flags = u32_at(self.receive.at(range), 0);
        let (fixed, no_zeroes) =
            (u32::from(handshake_flag::FIXED_NEWSTYLE), u32::from(handshake_flag::NO_ZEROES));
        if flags & !(fixed | no_zeroes) != 0 {
            return Err(SessionError::UnknownHandshakeFlags { flags });
        }
        self.negotiated.fixed_newstyle = flags & fixed != 0;
        self.negotiated.no_zeroes = flags & no_zeroes != 0;
        self.phase = Phase::Options;
        Ok(Progress::Handled)
    }

    pub(super) fn parse_option(&mut self) -> Result<Progress, SessionError> {
        if self.receive.len() < OPTION_HEADER_BYTES {
            // Garbage is told apart as soon as it can be.
            let seen = self.receive.unparsed();
            if seen.len() >= 8 && u64_at(seen, 0) != IHAVEOPT {
                return Err(SessionError::BadOptionMagic { found: u64_at(seen, 0) });
            }
            return Ok(Progress::Incomplete);
        }
        let header = self.receive.unparsed();
        let (magic, option, length) = (u64_at(header, 0), u32_at(header, 8), u32_at(header, 12));
        if magic != IHAVEOPT {
            return Err(SessionError::BadOptionMagic { found: magic });
        }
        if length > MAX_OPTION_BYTES {
            if length > MAX_REFUSED_OPTION_BYTES || option == option::EXPORT_NAME {
                return Err(SessionError::OptionTooLong { length });
            }
            self.count_option()?;
            self.receive.consume(OPTION_HEADER_BYTES);
            self.discard = u64::from(length);
            self.option_error(option, (reply::ERR_TOO_BIG, "the option is too long"));
            return Ok(Progress::Handled);
        }
        if self.receive.len() < OPTION_HEADER_BYTES + length as usize {
            return Ok(Progress::Incomplete);
        }
        self.count_option()?;
        self.receive.consume(OPTION_HEADER_BYTES);
        let range = self.receive.consume(length as usize);
        let data = self.receive.at(range).to_vec();
        self.answer_option(option, &data)
    }

    fn count_option(&mut self) -> Result<(), SessionError> {
        self.options_seen += 1;
        let limit = self.limits.options;
        if self.options_seen > limit { Err(SessionError::TooManyOptions { limit }) } else { Ok(()) }
    }

    fn answer_option(&mut self, option: u32, data: &[u8]) -> Result<Progress, SessionError> {
        let in_the_clear = self.tls == TlsPolicy::Required && !self.negotiated.encrypted;
        let outcome = match option {
            option::EXPORT_NAME => return self.export_name(data, in_the_clear),
            option::ABORT => {
                self.option_reply(option, reply::ACK, &[]);
                self.phase = Phase::Closed;
                return Ok(Progress::Step(Step::Disconnected));
            }
            option::STARTTLS => match self.start_tls(data) {
                Ok(()) => {
                    self.option_reply(option, reply::ACK, &[]);
                    if self.receive.len() > 0 {
                        return Err(SessionError::DataBeforeEncryption);
                    }
                    self.phase = Phase::AwaitTls;
                    return Ok(Progress::Step(Step::StartTls));
                }
                Err(refusal) => Err(refusal),
            },
            _ if in_the_clear => Err((reply::ERR_TLS_REQD, "this server needs an encrypted connection")),
            _ if self.refusal == Some(ErrorCode::ShuttingDown) => {
                Err((reply::ERR_SHUTDOWN, "the server is shutting down"))
            }
            option::LIST => self.list(data),
            option::GO | option::INFO => match self.describe(option, data) {
                Ok(export) if option == option::GO => {
                    self.option_reply(option, reply::ACK, &[]);
                    return Ok(Progress::Step(self.attach(export)));
                }
                outcome => outcome.map(|_| ()),
            },
            option::STRUCTURED_REPLY => self.structured_replies(data),
            option::EXTENDED_HEADERS => self.extended_headers(data),
            option::LIST_META_CONTEXT => self.list_contexts(data),
            option::SET_META_CONTEXT => self.set_contexts(data),
            _ => Err((reply::ERR_UNSUP, "unknown option")),
        };
        match outcome {
            Ok(()) => self.option_reply(option, reply::ACK, &[]),
            Err(refusal) => self.option_error(option, refusal),
        }
        Ok(Progress::Handled)
    }

    fn attach(&mut self, export: usize) -> Step {
        // Contexts count only for the export they were selected for.
        self.negotiated.contexts.take_if(|(selected_for, _)| *selected_for != export);
        self.phase = Phase::Transmission { export };
        self.rules = Rules::of(self.exports.get(export).expect("it was found"));
        Step::Attached { export }
    }

    /// This option has no error reply: what cannot be granted ends the connection.
    fn export_name(&mut self, data: &[u8], in_the_clear: bool) -> Result<Progress, SessionError> {
        if in_the_clear {
            return Err(SessionError::NotEncrypted);
        }
        let name = std::str::from_utf8(data).ok().filter(|_| is_valid_string(data));
        let found = name.and_then(|name| self.exports.find(name));
        let allowed = self.negotiated.style != HeaderStyle::Extended && self.refusal.is_none();
        let Some(index) = found.filter(|_| allowed) else {
            let shown = &data[..data.len().min(64)];
            return Err(SessionError::ExportRefused { name: String::from_utf8_lossy(shown).into_owned() });
        };
        let (size, flags) = self.size_and_flags(index);
        self.output.push(&size.to_be_bytes());
        self.output.push(&flags.to_be_bytes());
        if !self.negotiated.no_zeroes {
            self.output.push(&[0; EXPORT_NAME_PADDING]);
        }
        Ok(Progress::Step(self.attach(index)))
    }

    fn start_tls(&self, data: &[u8]) -> Result<(), Refusal> {
        if self.negotiated.encrypted {
            return Err((reply::ERR_INVALID, "the connection is encrypted already"));
        }
        if self.tls == TlsPolicy::Refused || !self.negotiated.fixed_newstyle {
            return Err((reply::ERR_POLICY, "this server does not encrypt"));
        }
        no_data(data)
    }

    fn structured_replies(&mut self, data: &[u8]) -> Result<(), Refusal> {
        no_data(data)?;
        if self.negotiated.style == HeaderStyle::Extended {
            return Err((reply::ERR_EXT_HEADER_REQD, "extended headers are agreed on already"));
        }
        self.negotiated.style = HeaderStyle::Structured;
        Ok(())
    }

    fn extended_headers(&mut self, data: &[u8]) -> Result<(), Refusal> {
        no_data(data)?;
        if self.negotiated.style == HeaderStyle::Extended {
            return Err((reply::ERR_INVALID, "extended headers are agreed on already"));
        }
        self.negotiated.style = HeaderStyle::Extended;
        Ok(())
    }

    fn list(&mut self, data: &[u8]) -> Result<(), Refusal> {
        no_data(data)?;
        let exports = self.exports.clone();
        for export in exports.iter() {
            let mut entry = (export.name.len() as u32).to_be_bytes().to_vec();
            entry.extend_from_slice(export.name.as_bytes());
            entry.extend_from_slice(export.description.as_bytes());
            self.option_reply(option::LIST, reply::SERVER, &entry);
        }
        Ok(())
    }

    /// Answers all of `NBD_OPT_INFO` or `NBD_OPT_GO` but the acknowledgement.
    fn describe(&mut self, option: u32, data: &[u8]) -> Result<usize, Refusal> {
        const MALFORMED: Refusal = (reply::ERR_INVALID, "malformed request for information");
        let mut fields = Fields(data);
        let name = fields.string().ok_or(MALFORMED)?;
        let count = fields.u16().ok_or(MALFORMED)?;
        if u32::from(count) > MAX_QUERIES {
            return Err((reply::ERR_TOO_BIG, "too many requests for information"));
        }
        let mut wanted = Vec::new();
        for _ in 0..count {
            wanted.push(fields.u16().ok_or(MALFORMED)?);
        }
        if !fields.0.is_empty() {
            return Err(MALFORMED);
        }
        let index = self.exports.find(name).ok_or((reply::ERR_UNKNOWN, "no such export"))?;
        let (size, flags) = self.size_and_flags(index);
        let exports = self.exports.clone();
        let export = exports.get(index).expect("it was found");

        let mut push = |kind: u16, payload: &[&[u8]]| {
            let mut data = kind.to_be_bytes().to_vec();
            payload.iter().for_each(|part| data.extend_from_slice(part));
            self.option_reply(option, reply::INFO, &data);
        };
        if wanted.contains(&info::NAME) {
            push(info::NAME, &[export.name.as_bytes()]);
        }
        if wanted.contains(&info::DESCRIPTION) {
            push(info::DESCRIPTION, &[export.description.as_bytes()]);
        }
        let sizes = export.block_sizes;
        push(
            info::BLOCK_SIZE,
            &[
                &sizes.minimum.to_be_bytes(),
                &sizes.preferred.to_be_bytes(),
                &sizes.maximum_payload.to_be_bytes(),
            ],
        );
        push(info::EXPORT, &[&size.to_be_bytes(), &flags.to_be_bytes()]);
        Ok(index)
    }

    fn size_and_flags(&self, index: usize) -> (u64, u16) {
        let export = self.exports.get(index).expect("it was found");
        let style = self.negotiated.style;
        let has_contexts = self
            .negotiated
            .contexts
            .as_ref()
            .is_some_and(|(of, selected)| *of == index && !selected.is_empty());
        let status_payload = style == HeaderStyle::Extended && has_contexts;
        (export.size, export.transmission_flags(style > HeaderStyle::Simple, status_payload))
    }

    fn list_contexts(&mut self, data: &[u8]) -> Result<(), Refusal> {
        let (export, queries) = self.context_queries(data)?;
        let exports = self.exports.clone();
        let export = exports.get(export).expect("it was found");
        for name in &export.contexts {
            let namespace = &name[..=name.find(':').expect("contexts are named namespace:leaf")];
            if queries.is_empty() || queries.iter().any(|query| *query == name || *query == namespace) {
                self.context_reply(option::LIST_META_CONTEXT, 0, name);
            }
        }
        Ok(())
    }

    fn set_contexts(&mut self, data: &[u8]) -> Result<(), Refusal> {
        self.negotiated.contexts = None;
        let (index, queries) = self.context_queries(data)?;
        let exports = self.exports.clone();
        let export = exports.get(index).expect("it was found");
        let is_asked_for = |&context: &ContextIndex| queries.contains(&export.contexts[context].as_str());
        let selected: Vec<ContextIndex> = (0..export.contexts.len()).filter(is_asked_for).collect();
        for &context in &selected {
            self.context_reply(option::SET_META_CONTEXT, context, &export.contexts[context]);
        }
        self.negotiated.contexts = Some((index, selected));
        Ok(())
    }

    fn context_queries<'a>(&self, data: &'a [u8]) -> Result<(usize, Vec<&'a str>), Refusal> {
        const MALFORMED: Refusal = (reply::ERR_INVALID, "malformed list of contexts");
        if self.negotiated.style == HeaderStyle::Simple {
            return Err((reply::ERR_INVALID, "contexts need structured replies"));
        }
        let mut fields = Fields(data);
        let name = fields.string().ok_or(MALFORMED)?;
        let count = fields.u32().ok_or(MALFORMED)?;
        if count > MAX_QUERIES {
            return Err((reply::ERR_TOO_BIG, "too many contexts"));
        }
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(fields.string().ok_or(MALFORMED)?);
        }
        if !fields.0.is_empty() {
            return Err(MALFORMED);
        }
        let export = self.exports.find(name).ok_or((reply::ERR_UNKNOWN, "no such export"))?;
        Ok((export, queries))
    }

    fn context_reply(&mut self, option: u32, context: ContextIndex, name: &str) {
        let mut data = (context as u32).to_be_bytes().to_vec();
        data.extend_from_slice(name.as_bytes());
        self.option_reply(option, reply::META_CONTEXT, &data);
    }

    fn option_reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        self.output.push(&OPTION_REPLY_MAGIC.to_be_bytes());
        self.output.push(&option.to_be_bytes());
        self.output.push(&kind.to_be_bytes());
        self.output.push(&(data.len() as u32).to_be_bytes());
        self.output.push(data);
    }

    fn option_error(&mut self, option: u32, (kind, message): Refusal) {
        self.option_reply(option, kind, message.as_bytes());
    }
}

fn no_data(data: &[u8]) -> Result<(), Refusal> {
    if data.is_empty() { Ok(()) } else { Err((reply::ERR_INVALID, "this option takes no data")) }
}

const _: () = assert!(MAX_STRING < MAX_OPTION_BYTES as usize);
