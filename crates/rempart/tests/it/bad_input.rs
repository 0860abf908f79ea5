//! What people get wrong, and what is broken on purpose: a clear error, nothing lost, an exit code that is not 0.

use crate::golden::Transcript;
use crate::rack::{Answer, PROGRAM, Rack, Server};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn hide(rack: &Rack) -> Vec<(String, &'static str)> {
    vec![(rack.path("").to_str().unwrap().trim_end_matches('/').to_owned(), "DIR")]
}

fn daemon(server: &Server) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .arg("--config")
        .arg(server.config())
        .args(["node", "run"])
        .stdin(Stdio::null())
        .env("REMPART_LOG", "off");
    command
}

#[test]
fn commands_that_cannot_be_carried_out_say_why() {
    let rack = Rack::new();
    let (a, b, _witness) = rack.cluster();
    let mut story = Transcript::default();
    let at = |name: &str| rack.path(name).to_str().unwrap().to_owned();
    rack.image("good.raw", 1 << 20, 7);

    story.comment("Images.");
    let import = |story: &mut Transcript, image: &str| {
        story.run(&a, &["vm", "import", "shop", "--disk", &at(image), "--memory", "64M"]);
    };
    import(&mut story, "missing.raw");
    qemu_img(&["create", "-q", "-f", "vmdk", &at("other.vmdk"), "1M"]);
    import(&mut story, "other.vmdk");
    let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=s,data=abc123",
        "-o",
        luks,
        &at("secret.qcow2"),
        "1M",
    ]);
    import(&mut story, "secret.qcow2");
    let mut cut = vec![0; 1 << 20];
    cut[450] = 0x83;
    cut[458..462].copy_from_slice(&100_000_u32.to_le_bytes());
    cut[510..512].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(at("cut.raw"), cut).unwrap();
    import(&mut story, "cut.raw");
    let whole = rack.image("whole.raw", 4 << 20, 7);
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", whole.to_str().unwrap(), &at("cut.qcow2")]);
    let file = std::fs::File::options().write(true).open(at("cut.qcow2")).unwrap();
    file.set_len(2 << 20).unwrap();
    import(&mut story, "cut.qcow2");
    let bios = ["vm", "import", "shop", "--disk", &at("good.raw"), "--nvram", &at("good.raw")];
    story.run(&a, &bios);
    story.run(&a, &["vm", "import", "A name", "--disk", &at("good.raw")]);
    story.run(&a, &["vm", "import", "shop", "--disk", &at("good.raw"), "--memory", "lots"]);

    story.comment("Names and addresses that are taken.");
    let mac = ["--bridge", "br0", "--mac", "52:54:00:00:00:07"];
    let good = at("good.raw");
    a.ok(&[&["vm", "import", "shop", "--disk", &good, "--memory", "64M"][..], &mac].concat());
    import(&mut story, "good.raw");
    story.run(&a, &[&["vm", "import", "mail", "--disk", &good][..], &mac].concat());
    story.run(&a, &["vm", "start", "mail"]);

    story.comment("Peers.");
    story.run(&a, &["protect", "shop", "--peer", "node-c"]);
    story.run(&a, &["protect", "shop", "--peer", "node-a"]);
    story.run(&a, &["protect", "shop", "--peer", "node-b"]);
    story.run(&a, &["unprotect", "shop"]);
    story.run(&a, &["failback", "shop"]);
    story.run(&a, &["cluster", "remove", "node-a"]);
    story.run(&a, &["cluster", "remove", "node-c"]);

    story.comment("Tokens.");
    story.run(&b, &["cluster", "join", "nonsense"]);
    let c = rack.node("node-c");
    let token = a.ok(&["cluster", "token"]);
    c.ok(&["cluster", "join", token.trim()]);
    let d = rack.node("node-d");
    let refused = d.run(&["cluster", "join", token.trim()]);
    story.told("rempart cluster join A-TOKEN-USED-BEFORE", refused.code, &refused.out, &refused.err);
    let short = a.ok(&["cluster", "token", "--valid", "1s"]);
    std::thread::sleep(Duration::from_millis(2100));
    let refused = d.run(&["cluster", "join", short.trim()]);
    story.told("rempart cluster join A-TOKEN-THAT-EXPIRED", refused.code, &refused.out, &refused.err);
    let for_witness = a.refused(&["cluster", "token", "--role", "witness"]);
    story.told("rempart cluster token --role witness", for_witness.code, &for_witness.out, &for_witness.err);
    story.run(&a, &["cluster", "create", "again"]);

    story.comment("What gives something up asks first.");
    story.run(&a, &["vm", "delete", "shop"]);
    story.run(&a, &["vm", "disk", "remove", "shop", "0"]);
    story.run(&a, &["vm", "disk", "remove", "shop", "7", "--yes"]);
    story.run(&a, &["vm", "disk", "resize", "shop", "0", "512K"]);
    story.run(&a, &["rejoin", "shop"]);
    assert_eq!(a.vm("shop")["role"], "primary", "nothing of all that changed it");
    a.io("shop", 0, &["read -P 7 0 1M"]);
    story.check("bad-input.txt", &hide(&rack));
}

#[test]
fn daemons_that_cannot_run_say_why() {
    let rack = Rack::new();
    let mut story = Transcript::default();
    let mut tell = |what: &str, answer: Answer| {
        story.comment(what);
        assert_ne!(answer.code, 0, "{what}");
        story.told("rempart node run", answer.code, &answer.out, &answer.err);
    };
    let answer = |command: &mut Command| Answer::of(command.output().unwrap());

    let mut running = rack.node("node-a");
    let same_port = rack.initialised("node-b");
    let text = std::fs::read_to_string(same_port.config()).unwrap();
    let taken = text.replace(&same_port.address.to_string(), &running.address.to_string());
    std::fs::write(same_port.config(), taken).unwrap();
    tell("the port is taken", answer(&mut daemon(&same_port)));
    tell("another daemon runs on these files", answer(&mut daemon(&running)));

    std::fs::write(same_port.config(), &text).unwrap();
    for section in ["[nbd]", "[metrics]"] {
        same_port.configure(section, &format!("{section}\nlisten = \"{}\"", running.address));
        tell(&format!("the port of {section} is taken"), answer(&mut daemon(&same_port)));
        std::fs::write(same_port.config(), &text).unwrap();
    }
    running.ok(&["cluster", "create", "lab"]);
    let mut witness = rack.witness("witness", &running);
    witness.kill();
    witness.configure(&witness.address.to_string(), &running.address.to_string());
    let answer_of_witness = witness.run(&["witness", "run"]);

    let server = rack.initialised("node-c");
    let text = std::fs::read_to_string(server.config()).unwrap();
    std::fs::write(server.config(), &text[..text.find("data_dir").unwrap() + 12]).unwrap();
    tell("the configuration is cut off", answer(&mut daemon(&server)));
    std::fs::write(server.config(), text.replace("[vm]", "[vm]\ncolour = \"red\"")).unwrap();
    tell("it holds a key that nobody knows", answer(&mut daemon(&server)));
    let schedule = "[[backup]]\nname = \"nightly\"\nrepository = \"/srv/backups\"\nkey_file = \"/root/key\"\n\
                    machines = \"all\"\nschedule = \"15 2 * * *\"\nformat = \"qcow2\"\n# [[backup]]\n";
    std::fs::write(server.config(), text.replace("# [[backup]]\n", schedule)).unwrap();
    tell("a schedule has what its machines cannot do", answer(&mut daemon(&server)));
    let limit = schedule.replace("format = \"qcow2\"", "time_limit_s = \"6h\"");
    std::fs::write(server.config(), text.replace("# [[backup]]\n", &limit)).unwrap();
    tell("a schedule has a limit in words", answer(&mut daemon(&server)));
    std::fs::write(server.config(), text.replace("[timing]", "[timing]\nlease_ms = 10")).unwrap();
    tell("its times do not fit together", answer(&mut daemon(&server)));
    std::fs::write(server.config(), text.replace("[vm]", "[vm]\nqemu = \"/nowhere/qemu\"")).unwrap();
    tell("there is no QEMU", answer(&mut daemon(&server)));
    std::fs::write(server.config(), &text).unwrap();
    let identity = std::fs::read(server.data("identity.json")).unwrap();
    std::fs::write(server.data("identity.json"), &identity[..10]).unwrap();
    tell("its identity is cut off", answer(&mut daemon(&server)));
    std::fs::write(server.data("identity.json"), identity).unwrap();
    std::fs::write(server.data("cluster.json"), "{").unwrap();
    tell("its list of members is cut off", answer(&mut daemon(&server)));
    std::fs::remove_file(server.data("cluster.json")).unwrap();
    for path in [rack.path(""), server.home.clone(), server.config()] {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    // The program must be where everybody may run it.
    let copy = rack.path("rempart");
    std::fs::copy(PROGRAM, &copy).unwrap();
    let mut as_nobody = Command::new(&copy);
    as_nobody.arg("--config").arg(server.config()).args(["node", "run"]).uid(65534).gid(65534);
    tell("not root", answer(as_nobody.env("REMPART_LOG", "off")));
    story.comment("the witness's port is taken");
    story.told("rempart witness run", answer_of_witness.code, &answer_of_witness.out, &answer_of_witness.err);
    let new = rack.path("new");
    let mut init = Command::new(&copy);
    init.arg("--config").arg(new.join("rempart.toml")).args(["node", "init", "--name", "new"]);
    init.args(["--listen", "127.0.0.1:1", "--data-dir"]).arg(new.join("data")).uid(65534).gid(65534);
    let refused = answer(&mut init);
    story.comment("setting up a node as somebody else");
    story.told("rempart node init", refused.code, &refused.out, &refused.err);
    running.kill();
    story.comment("the configuration is cut off, and a command wants to know the socket");
    std::fs::write(server.config(), &text[..text.find("data_dir").unwrap()]).unwrap();
    story.run(&server, &["status"]);
    story.comment("and a command finds no daemon");
    story.run(&running, &["status"]);
    story.check("daemon-refuses.txt", &hide(&rack));
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 0x40;
    std::fs::write(path, bytes).unwrap();
}

/// One damaged machine does not keep the others down, and is not touched.
#[test]
fn damaged_files_keep_one_machine_out_and_are_told() {
    let rack = Rack::new();
    let mut node = rack.node("node-a");
    for name in ["good", "no-superblock", "no-record", "newer"] {
        node.import(name, &[&rack.image(&format!("{name}.raw"), 1 << 20, 7)]);
    }
    let adopted = rack.image("no-disk.raw", 1 << 20, 7);
    let disk = adopted.to_str().unwrap();
    node.ok(&["vm", "import", "no-disk", "--memory", "64M", "--adopt", "--disk", disk]);
    node.ok(&["vm", "start", "no-disk"]);
    let qemu = LeftBehind(node.vm("no-disk")["qemu_pid"].as_u64().unwrap());
    node.kill();
    std::fs::remove_file(&adopted).unwrap();
    let store = node.data("vms/no-superblock/store");
    let superblocks: Vec<_> = std::fs::read_dir(&store)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_str().unwrap().contains("superblock"))
        .collect();
    assert!(!superblocks.is_empty(), "{store:?}");
    for path in &superblocks {
        // Both copies, wherever they are: every sector of the file.
        let length = std::fs::metadata(path).unwrap().len() as usize;
        (0..length).step_by(512).for_each(|sector| flip(path, sector + 40));
    }
    let record = node.data("vms/no-record/vm.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, &text[..text.len() / 2]).unwrap();
    let newer = node.data("vms/newer/vm.json");
    let text = std::fs::read_to_string(&newer).unwrap();
    std::fs::write(
        &newer,
        text.replacen("\"format\": 1", "\"format\": 99", 1).replacen("\"format\":1", "\"format\":99", 1),
    )
    .unwrap();
    node.start();
    node.until("the sound one leads", || node.vm("good")["role"] == "primary");
    node.io("good", 0, &["read -P 7 0 1M"]);
    for name in ["no-superblock", "no-record", "newer"] {
        let log = node.log();
        let told = log.lines().any(|line| line.contains("not opened") && line.contains(name));
        assert!(told, "{name}: {log}");
        let answer = node.refused(&["vm", "start", name]);
        assert_eq!(answer.code, 1, "{}", answer.err);
        assert!(node.data("vms").join(name).join("disk0.raw").exists());
    }

    // The whole chain of causes, wherever it is told.
    let why = format!("`{disk}`: No such file");
    let log = node.log();
    let told = log.lines().any(|line| line.contains("not opened") && line.contains(&why));
    assert!(told, "{log}");
    let status = node.json(&["status"]);
    let conditions = status["node"]["conditions"].as_array().unwrap();
    let critical = |condition: &&serde_json::Value| condition["severity"] == "critical";
    assert_eq!(conditions.iter().filter(critical).count(), 4, "{status}");
    let text = conditions.iter().filter_map(|condition| condition["text"].as_str());
    assert!(text.into_iter().any(|text| text.contains("`no-disk`") && text.contains(&why)), "{status}");
    let list = node.ok(&["vm", "list"]);
    assert!(list.lines().any(|line| line.starts_with("no-disk") && line.contains("NOT OPENED")), "{list}");
    let listed = node.json(&["vm", "list"]);
    let state = |name: &str| {
        let entry = listed.as_array().unwrap().iter().find(|vm| vm["name"] == name);
        entry.map(|vm| vm["state"].as_str().unwrap().to_owned())
    };
    assert_eq!(
        (state("no-disk").as_deref(), state("good").as_deref()),
        (Some("not-opened"), Some("stopped"))
    );
    for command in [&["vm", "start", "no-disk"][..], &["vm", "stop", "no-disk"], &["status", "no-disk"]] {
        let answer = node.refused(command);
        assert!(answer.code == 1 && answer.err.contains(&why), "{command:?}: {}", answer.err);
    }
    let spare = rack.image("spare.raw", 1 << 20, 8);
    let taken = node.refused(&["vm", "import", "no-disk", "--disk", spare.to_str().unwrap()]);
    assert!(taken.err.contains("there is a virtual machine `no-disk` already"), "{}", taken.err);

    // Its process, which no daemon renews a lease for or asks anything, can be ended.
    assert!(qemu.runs());
    let answer = node.refused(&["vm", "stop", "no-disk", "--force"]);
    assert!(answer.err.contains("cannot be recorded"), "{}", answer.err);
    node.until("QEMU is gone", || !qemu.runs());
    let answer = node.refused(&["vm", "stop", "no-disk", "--force"]);
    assert!(answer.err.contains("no process of `no-disk` runs"), "{}", answer.err);

    // Once what was missing is back, so is the machine.
    node.kill();
    rack.image("no-disk.raw", 1 << 20, 7);
    node.start();
    node.until("it is served", || node.vm("no-disk")["role"] == "primary");
    node.ok(&["vm", "stop", "no-disk", "--force"]);
}

/// The peer's copy is neither taken for none nor for deleted.
#[test]
fn a_peer_tells_of_a_copy_that_it_could_not_open() {
    let rack = Rack::new();
    let (a, mut b, _witness) = rack.cluster();
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    b.kill();
    std::fs::remove_file(b.data("vms/shop/disk0.raw")).unwrap();
    b.start();
    b.until("it is told", || b.json(&["status"])["unopened"].as_array().is_some_and(|vms| vms.len() == 1));
    let answer = b.refused(&["cluster", "remove", "node-a"]);
    assert!(answer.err.contains("`shop`, which was not opened"), "{}", answer.err);
    a.until("it is out", || a.vm("shop")["in_sync"].as_array().is_some_and(|nodes| nodes.len() == 1));
    a.ok(&["unprotect", "shop"]);
    let events = a.vm("shop")["events"].to_string();
    let told = events.contains("could not be deleted") && events.contains("No such file");
    assert!(told, "{events}");
    let refused = a.refused(&["protect", "shop", "--peer", "node-b"]);
    assert!(refused.err.contains("node `node-b` could not open its copy of `shop`"), "{}", refused.err);
    b.kill();
    std::fs::rename(b.data("vms/shop"), rack.path("moved-away")).unwrap();
    b.start();
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    a.until_mirrored("shop");
}

/// The process of a machine, ended with the test whatever comes of that.
struct LeftBehind(u64);

impl LeftBehind {
    /// As itself or as what nobody waited for yet.
    fn runs(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0)).unwrap_or_default();
        status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
    }
}

impl Drop for LeftBehind {
    fn drop(&mut self) {
        if self.runs() {
            let _ = Command::new("kill").args(["-KILL", &self.0.to_string()]).status();
        }
    }
}

/// Garbage that any socket gets: text, zeroes, all ones, a TLS record that lies, half a greeting.
fn garbage() -> Vec<Vec<u8>> {
    vec![
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        b"POST /v1/vms HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{\"name\":1".to_vec(),
        vec![0; 4096],
        vec![0xff; 4096],
        [&[22, 3, 1, 0xff, 0xff, 1, 0, 0xff, 0xff][..], &[0x41; 600]].concat(),
        b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff".to_vec(),
        b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0garbage behind STARTTLS".to_vec(),
    ]
}

fn pour(mut stream: impl Read + Write, bytes: &[u8]) {
    // It may be hung up on in the middle: that is the point.
    let _ = stream.write_all(bytes);
    let mut answer = [0; 4096];
    let _ = stream.read(&mut answer);
}

#[test]
fn garbage_on_every_socket_hurts_nobody() {
    let rack = Rack::new();
    let exports = Rack::free_address();
    let metrics = Rack::free_address();
    let mut a = rack.initialised("node-a");
    let text = std::fs::read_to_string(a.config()).unwrap();
    let text = text.replace("[nbd]", &format!("[nbd]\nlisten = \"{exports}\""));
    std::fs::write(a.config(), text.replace("[metrics]", &format!("[metrics]\nlisten = \"{metrics}\"")))
        .unwrap();
    a.start();
    a.ok(&["cluster", "create", "lab"]);
    let witness = rack.witness("witness", &a);
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    let limit = Some(Duration::from_millis(500));
    for bytes in garbage() {
        for address in [a.address, exports, metrics, witness.address] {
            let stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(limit).unwrap();
            pour(stream, &bytes);
        }
        for socket in ["run/api.sock", "run/vms/shop/nbd.sock"] {
            let stream = UnixStream::connect(a.home.join(socket)).unwrap();
            stream.set_read_timeout(limit).unwrap();
            pour(stream, &bytes);
        }
    }
    assert_eq!(a.vm("shop")["role"], "primary");
    a.io("shop", 0, &["write -P 9 0 64k", "flush", "read -P 9 0 64k"]);
    a.import("mail", &[&rack.image("mail.raw", 1 << 20, 8)]);
    assert_eq!(a.json(&["cluster", "members"])["members"].as_array().unwrap().len(), 2);
    let log = [a.log(), witness.log()].concat();
    assert!(!log.contains("panicked"), "{log}");
}

/// The address of our witness leads to another cluster's.
#[test]
fn the_witness_of_another_cluster_is_not_listened_to() {
    let rack = Rack::new();
    let (mut a, _b, mut ours) = rack.cluster();
    let stranger = rack.node("stranger");
    stranger.ok(&["cluster", "create", "other"]);
    let theirs = rack.witness("theirs", &stranger);
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    a.kill();
    ours.kill();
    let path = a.data("cluster.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace(&ours.address.to_string(), &theirs.address.to_string())).unwrap();
    a.start();
    a.until("it says so", || a.log().contains("register not read") && a.log().contains("cluster"));
    let members = a.json(&["cluster", "members"]);
    let witness = members["members"].as_array().unwrap().iter().find(|member| member["role"] == "witness");
    assert_eq!(witness.unwrap()["reachable"], false, "{members}\n{}", a.log());
}
