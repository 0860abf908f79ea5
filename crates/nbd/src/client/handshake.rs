//! From the server's greeting to an attached export, a list of exports, or the start of TLS.

use super::ClientError;
use crate::export::{BlockSizes, is_valid_string};
use crate::header::HeaderStyle;
use crate::protocol::{
    EXPORT_NAME_PADDING, IHAVEOPT, INIT_PASSWD, OPTION_REPLY_MAGIC, handshake_flag, info, option,
    option_reply as reply, transmission_flag as flag,
};
use crate::wire::{Fields, u16_at, u32_at, u64_at};
use std::collections::VecDeque;

/// The longest reply to an option that is understood.
const MAX_REPLY_BYTES: u32 = 64 * 1024;
/// Replies to one option.
const MAX_REPLIES: usize = 4096;

/// What to ask a server for.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// Empty for the server's default.
    pub export: String,
    /// Metadata contexts to ask for, by full name.
    pub contexts: Vec<String>,
    /// The best form of headers to ask for; less is used if the server offers less.
    pub header_style: HeaderStyle,
    /// The longest wait: for the connection and handshake, and then for any one call.
    pub timeout: std::time::Duration,
}

impl ConnectOptions {
    /// Extended headers, no contexts, 10 s.
    pub fn new(export: impl Into<String>) -> ConnectOptions {
        ConnectOptions {
            export: export.into(),
            contexts: Vec::new(),
            header_style: HeaderStyle::Extended,
            timeout: std::time::Duration::from_secs(10),
        }
    }
}

/// What a server told about one export.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExportInfo {
    pub name: String,
    pub description: String,
    /// In bytes.
    pub size: u64,
    /// `None` if the server did not say.
    pub block_sizes: Option<BlockSizes>,
    pub(crate) flags: u16,
}

macro_rules! offers {
    ($($(#[$doc:meta])* $name:ident = $flag:ident;)*) => {
        $($(#[$doc])* pub fn $name(&self) -> bool { self.flags & flag::$flag != 0 })*
    };
}

impl ExportInfo {
    offers! {
        is_read_only = READ_ONLY;
        can_flush = SEND_FLUSH;
        can_fua = SEND_FUA;
        can_trim = SEND_TRIM;
        can_write_zeroes = SEND_WRITE_ZEROES;
        can_fast_zero = SEND_FAST_ZERO;
        can_cache = SEND_CACHE;
        is_rotational = ROTATIONAL;
        /// A flush on one connection covers all.
        can_multi_connection = CAN_MULTI_CONN;
        /// A block status request may name the contexts it wants.
        can_filter_block_status = BLOCK_STATUS_PAYLOAD;
    }

    /// The longest read or write the server takes.
    pub fn maximum_payload(&self) -> u32 {
        self.block_sizes.unwrap_or_default().maximum_payload
    }
}

/// Where a handshake ended.
#[derive(Debug)]
pub enum Outcome {
    Attached {
        export: ExportInfo,
        style: HeaderStyle,
        /// The contexts the server has of those asked for, and its numbers for them.
        contexts: Vec<(u32, String)>,
    },
    Listed(Vec<ExportInfo>),
    StartTls,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Goal {
    Attach,
    List,
    StartTls,
}

/// ```text
/// attach:   Greeting ─► Extended ─► [Structured] ─► [Contexts] ─► Go ─► [ExportName] ─► done
/// list:     Greeting ─► Names ─► Info, once for each ─► done (with an abort)
/// StartTls: Greeting ─► Tls ─► done;   then attach or list over TLS, from behind the greeting
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Greeting,
    Extended,
    Structured,
    Contexts,
    Go,
    ExportName,
    Names,
    Info,
    Tls,
    Done,
}

/// A handshake in progress.
#[derive(Debug)]
pub struct Handshake {
    goal: Goal,
    options: ConnectOptions,
    step: Step,
    received: Vec<u8>,
    output: Vec<u8>,
    no_zeroes: bool,
    style: HeaderStyle,
    contexts: Vec<(u32, String)>,
    export: ExportInfo,
    saw_export: bool,
    replies: usize,
    names: VecDeque<ExportInfo>,
    listed: Vec<ExportInfo>,
}

impl Handshake {
    /// Attaches to an export.
    pub fn attach(options: &ConnectOptions) -> Handshake {
        Handshake::new(Goal::Attach, options.clone())
    }

    /// Lists the exports, with what the server tells about each.
    pub fn list() -> Handshake {
        Handshake::new(Goal::List, ConnectOptions::new(""))
    }

    /// Asks for TLS. Once it runs, go on with another handshake that [`Handshake::skip_greeting`]s.
    pub fn start_tls() -> Handshake {
        Handshake::new(Goal::StartTls, ConnectOptions::new(""))
    }

    fn new(goal: Goal, options: ConnectOptions) -> Handshake {
        Handshake {
            goal,
            options,
            step: Step::Greeting,
            received: Vec::new(),
            output: Vec::new(),
            no_zeroes: false,
            style: HeaderStyle::Simple,
            contexts: Vec::new(),
            export: ExportInfo::default(),
            saw_export: false,
            replies: 0,
            names: VecDeque::new(),
            listed: Vec::new(),
        }
    }

    /// The greeting was exchanged before TLS started.
    pub fn skip_greeting(&mut self) {
        assert_eq!(self.step, Step::Greeting, "nothing was received yet");
        self.begin();
    }

    /// What to send now.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Takes received bytes; says where the handshake ended once it did.
    ///
    /// # Errors
    /// If the server refuses, or does not speak the protocol.
    pub fn received(&mut self, bytes: &[u8]) -> Result<Option<Outcome>, ClientError> {
        self.received.extend_from_slice(bytes);
        while self.step != Step::Done {
            let consumed = match self.step {
                Step::Greeting => self.read_greeting()?,
                Step::ExportName => self.read_export_name()?,
                _ => self.read_option_reply()?,
            };
            if consumed == 0 {
                return Ok(None);
            }
            self.received.drain(..consumed);
        }
        if !self.received.is_empty() {
            return Err(ClientError::Violation("bytes behind the end of the handshake"));
        }
        Ok(Some(match self.goal {
            Goal::Attach => Outcome::Attached {
                export: std::mem::take(&mut self.export),
                style: self.style,
                contexts: std::mem::take(&mut self.contexts),
            },
            Goal::List => Outcome::Listed(std::mem::take(&mut self.listed)),
            Goal::StartTls => Outcome::StartTls,
        }))
    }

    fn read_greeting(&mut self) -> Result<usize, ClientError> {
        if self.received.len() >= 8 && u64_at(&self.received, 0) != INIT_PASSWD {
            return Err(ClientError::Violation("this is no NBD server"));
        }
        if self.received.len() >= 16 && u64_at(&self.received, 8) != IHAVEOPT {
            return Err(ClientError::Violation("only the old handshake is spoken"));
        }
        if self.received.len() < 18 {
            return Ok(0);
        }
        let flags = u16_at(&self.received, 16);
        if flags & handshake_flag::FIXED_NEWSTYLE == 0 {
            return Err(ClientError::Violation("the fixed newstyle handshake is not spoken"));
        }
        self.no_zeroes = flags & handshake_flag::NO_ZEROES != 0;
        let ours = flags & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        self.output.extend_from_slice(&u32::from(ours).to_be_bytes());
        self.begin();
        Ok(18)
    }

    fn begin(&mut self) {
        match self.goal {
            Goal::StartTls => self.ask(Step::Tls, option::STARTTLS, &[]),
            Goal::List => self.ask(Step::Names, option::LIST, &[]),
            Goal::Attach => match self.options.header_style {
                HeaderStyle::Extended => self.ask(Step::Extended, option::EXTENDED_HEADERS, &[]),
                HeaderStyle::Structured => self.ask(Step::Structured, option::STRUCTURED_REPLY, &[]),
                HeaderStyle::Simple => self.ask_to_go(),
            },
        }
    }

    fn ask(&mut self, step: Step, option: u32, data: &[u8]) {
        self.step = step;
        self.replies = 0;
        self.output.extend_from_slice(&IHAVEOPT.to_be_bytes());
        self.output.extend_from_slice(&option.to_be_bytes());
        self.output.extend_from_slice(&(data.len() as u32).to_be_bytes());
        self.output.extend_from_slice(data);
    }

    /// Contexts if any are wanted and possible, then the export.
    fn ask_for_contexts(&mut self) {
        if self.options.contexts.is_empty() || self.style == HeaderStyle::Simple {
            return self.ask_to_go();
        }
        let mut data = string(&self.options.export);
        data.extend_from_slice(&(self.options.contexts.len() as u32).to_be_bytes());
        for context in &self.options.contexts {
            data.extend(string(context));
        }
        self.ask(Step::Contexts, option::SET_META_CONTEXT, &data);
    }

    fn ask_to_go(&mut self) {
        let name = self.options.export.clone();
        self.export = ExportInfo { name: name.clone(), ..ExportInfo::default() };
        self.ask(Step::Go, option::GO, &info_request(&name));
    }

    fn ask_about_next(&mut self) {
        match self.names.pop_front() {
            Some(named) => {
                let data = info_request(&named.name);
                self.export = named;
                self.ask(Step::Info, option::INFO, &data);
            }
            None => {
                self.ask(Step::Done, option::ABORT, &[]);
            }
        }
    }

    fn read_option_reply(&mut self) -> Result<usize, ClientError> {
        if self.received.len() < 20 {
            return Ok(0);
        }
        let (option, kind) = (u32_at(&self.received, 8), u32_at(&self.received, 12));
        let length = u32_at(&self.received, 16);
        if u64_at(&self.received, 0) != OPTION_REPLY_MAGIC || option != self.asked_option() {
            return Err(ClientError::Violation("a reply that is not to the option sent"));
        }
        if length > MAX_REPLY_BYTES {
            return Err(ClientError::Violation("a reply to an option that is too long"));
        }
        let end = 20 + length as usize;
        if self.received.len() < end {
            return Ok(0);
        }
        self.replies += 1;
        if self.replies > MAX_REPLIES {
            return Err(ClientError::Violation("too many replies to one option"));
        }
        let data = self.received[20..end].to_vec();
        if kind & reply::ERROR_BIT != 0 {
            self.refused(option, kind, &data)?;
        } else {
            self.accepted(kind, &data)?;
        }
        Ok(end)
    }

    fn asked_option(&self) -> u32 {
        match self.step {
            Step::Extended => option::EXTENDED_HEADERS,
            Step::Structured => option::STRUCTURED_REPLY,
            Step::Contexts => option::SET_META_CONTEXT,
            Step::Go => option::GO,
            Step::Names => option::LIST,
            Step::Info => option::INFO,
            Step::Tls => option::STARTTLS,
            Step::Greeting | Step::ExportName | Step::Done => unreachable!("no option waits for a reply"),
        }
    }

    fn accepted(&mut self, kind: u32, data: &[u8]) -> Result<(), ClientError> {
        const MALFORMED: ClientError = ClientError::Violation("a malformed reply to an option");
        match (self.step, kind) {
            (Step::Extended, reply::ACK) => {
                self.style = HeaderStyle::Extended;
                self.ask_for_contexts();
            }
            (Step::Structured, reply::ACK) => {
                self.style = HeaderStyle::Structured;
                self.ask_for_contexts();
            }
            (Step::Contexts, reply::META_CONTEXT) => {
                let mut fields = Fields(data);
                let id = fields.u32().ok_or(MALFORMED)?;
                let name = text(fields.0).ok_or(MALFORMED)?;
                if self.contexts.iter().any(|(known, _)| *known == id)
                    || !self.options.contexts.contains(&name)
                {
                    return Err(ClientError::Violation("a context that was not asked for"));
                }
                self.contexts.push((id, name));
            }
            (Step::Contexts, reply::ACK) => self.ask_to_go(),
            (Step::Go | Step::Info, reply::INFO) => self.read_info(data).ok_or(MALFORMED)?,
            (Step::Go | Step::Info, reply::ACK) if !self.saw_export => {
                return Err(ClientError::Violation("an export without its size"));
            }
            (Step::Go, reply::ACK) => self.step = Step::Done,
            (Step::Info, reply::ACK) => {
                self.listed.push(std::mem::take(&mut self.export));
                self.saw_export = false;
                self.ask_about_next();
            }
            (Step::Names, reply::SERVER) => {
                let mut fields = Fields(data);
                let name = fields.string().ok_or(MALFORMED)?.to_owned();
                let description = text(fields.0).ok_or(MALFORMED)?;
                self.names.push_back(ExportInfo { name, description, ..ExportInfo::default() });
            }
            (Step::Names, reply::ACK) => self.ask_about_next(),
            (Step::Tls, reply::ACK) => self.step = Step::Done,
            _ => return Err(ClientError::Violation("an unexpected reply to an option")),
        }
        Ok(())
    }

    fn read_info(&mut self, data: &[u8]) -> Option<()> {
        let mut fields = Fields(data);
        match fields.u16()? {
            info::EXPORT => {
                self.export.size = fields.u64()?;
                self.export.flags = fields.u16()?;
                self.saw_export = true;
            }
            info::NAME => self.export.name = text(fields.0)?,
            info::DESCRIPTION => self.export.description = text(fields.0)?,
            info::BLOCK_SIZE => {
                let (minimum, preferred) = (fields.u32()?, fields.u32()?);
                let sizes = BlockSizes { minimum, preferred, maximum_payload: fields.u32()? };
                if !minimum.is_power_of_two() || !preferred.is_power_of_two() || sizes.maximum_payload == 0 {
                    return None;
                }
                self.export.block_sizes = Some(sizes);
            }
            _ => {}
        }
        Some(())
    }

    fn refused(&mut self, option: u32, kind: u32, data: &[u8]) -> Result<(), ClientError> {
        let message = String::from_utf8_lossy(&data[..data.len().min(4096)]).into_owned();
        match (self.step, kind) {
            (_, reply::ERR_TLS_REQD) => return Err(ClientError::EncryptionRequired { message }),
            (Step::Extended, _) => self.ask(Step::Structured, option::STRUCTURED_REPLY, &[]),
            (Step::Structured, _) => self.ask_to_go(),
            (Step::Contexts, reply::ERR_UNSUP) => {
                self.contexts.clear();
                self.ask_to_go();
            }
            (Step::Go | Step::Contexts, reply::ERR_UNKNOWN) => {
                return Err(ClientError::NoSuchExport { name: self.options.export.clone(), message });
            }
            (Step::Go, reply::ERR_UNSUP) if self.style < HeaderStyle::Extended => {
                let name = self.options.export.clone();
                self.ask(Step::ExportName, option::EXPORT_NAME, name.as_bytes());
            }
            // An export that went away between the list and this, or that may not be asked about.
            (Step::Info, _) => {
                self.export = ExportInfo::default();
                self.ask_about_next();
            }
            _ => return Err(ClientError::Refused { option, reply: kind, message }),
        }
        Ok(())
    }

    fn read_export_name(&mut self) -> Result<usize, ClientError> {
        let length = 10 + if self.no_zeroes { 0 } else { EXPORT_NAME_PADDING };
        if self.received.len() < length {
            return Ok(0);
        }
        self.export.size = u64_at(&self.received, 0);
        self.export.flags = u16_at(&self.received, 8);
        self.step = Step::Done;
        Ok(length)
    }
}

fn text(bytes: &[u8]) -> Option<String> {
    is_valid_string(bytes).then(|| String::from_utf8_lossy(bytes).into_owned())
}

fn string(text: &str) -> Vec<u8> {
    let mut data = (text.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(text.as_bytes());
    data
}

fn info_request(name: &str) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&3u16.to_be_bytes());
    for wanted in [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE] {
        data.extend_from_slice(&wanted.to_be_bytes());
    }
    data
}
