"""A gateway on a link of its own that speaks PCP, NAT-PMP and UPnP-IGD, and may be bad."""

from __future__ import annotations

import contextlib
import re
import struct

import trio
import trio.testing

from natswarm.address import Endpoint
from natswarm.net.gateway import Gateway, MappingProtocol
from natswarm.net.port import Arrival, PortStatistics

PCP, NAT_PMP, UPNP = MappingProtocol
HOME = Gateway("192.168.1.1", "192.168.1.7")
IGD = "urn:schemas-upnp-org:device:InternetGatewayDevice:"
SERVICE = "urn:schemas-upnp-org:service:WANIPConnection:"


class FakeGateway:
    """Grants what it is asked; what it is like can be changed at any time.

    Attributes:
        speaks: In which protocols it answers.
        mappings: (external port) -> (internal ip, internal port, description, end).
        answers: What it sends instead of the true answer, by protocol; None is silence.
        log: Every request, in words.
    """

    def __init__(self, gateway: Gateway = HOME) -> None:
        self.gateway = gateway
        self.speaks = set(MappingProtocol)
        self.mappings: dict[int, tuple[str, int, str, float]] = {}
        self.external_ip = "203.0.113.9"
        self.lease_max_s = 86_400
        self.igd_version = 1
        self.soap_faults: dict[str, int] = {}
        self.http: bytes | None = None
        self.location = f"http://{gateway.ip}:5000/desc.xml"
        self.control_url = "/ctl"
        self.lost_count = 0
        self.pcp_result = 0
        self.log: list[str] = []
        self.boot()

    def boot(self) -> None:
        self.started_at = trio.current_time() - 1000
        self.mappings.clear()

    def reboot(self) -> None:
        self.boot()
        self.started_at = trio.current_time()

    @property
    def epoch_s(self) -> int:
        return int(trio.current_time() - self.started_at)

    def living(self) -> dict[int, tuple[str, int]]:
        """The mappings whose lease has not ended."""
        now = trio.current_time()
        return {port: entry[:2] for port, entry in self.mappings.items() if entry[3] > now}

    def grant(self, ip: str, internal: int, external: int, lease_s: int, text: str) -> int:
        """Make or renew; return the external port."""
        for port, entry in self.mappings.items():
            if entry[:2] == (ip, internal) and text != "natswarm":
                external = port
        while external in self.mappings and self.mappings[external][:2] != (ip, internal):
            external += 1
        external = external or 40_000
        self.mappings[external] = (ip, internal, text, trio.current_time() + lease_s)
        return external

    def forget(self, ip: str, internal: int) -> None:
        self.mappings = {p: e for p, e in self.mappings.items() if e[:2] != (ip, internal)}

    def handle_datagram(self, data: bytes, source: Endpoint, destination: Endpoint) -> bytes | None:
        if self.lost_count:
            self.lost_count -= 1
            return None
        if destination.port == self.gateway.ssdp_port:
            return self._ssdp(data) if UPNP in self.speaks else None
        if destination != Endpoint(self.gateway.ip, self.gateway.control_port):
            return None
        if data[0] == 2:
            if PCP in self.speaks:
                return self._pcp(data, source)
            is_older = NAT_PMP in self.speaks
            return struct.pack("!BBHI", 0, data[1] | 0x80, 1, self.epoch_s) if is_older else None
        return self._nat_pmp(data, source) if NAT_PMP in self.speaks else None

    def _pcp(self, data: bytes, source: Endpoint) -> bytes:
        opcode, lease_s = data[1], int.from_bytes(data[4:8], "big")
        self.log.append(f"PCP {opcode} {lease_s}")
        body = b""
        if opcode == 1 and not self.pcp_result:
            nonce, internal, external = struct.unpack("!12s4xHH", data[24:44])
            text = f"PCP {nonce.hex()}"
            if lease_s:
                lease_s = min(lease_s, self.lease_max_s)
                external = self.grant(source.ip, internal, external, lease_s, text)
            else:
                self.forget(source.ip, internal)
            ip = bytes.fromhex("00000000000000000000ffff") + bytes(
                map(int, self.external_ip.split("."))
            )
            body = struct.pack("!12sB3xHH16s", nonce, 17, internal, external, ip)
        elif opcode == 1:
            body = data[24:]
        result = self.pcp_result if opcode == 1 else 0
        return struct.pack("!BBBBII12x", 2, opcode | 0x80, 0, result, lease_s, self.epoch_s) + body

    def _nat_pmp(self, data: bytes, source: Endpoint) -> bytes:
        self.log.append(f"NAT-PMP {data[1]}")
        head = struct.pack("!BBHI", 0, data[1] | 0x80, 0, self.epoch_s)
        if data[1] == 0:
            return head + bytes(map(int, self.external_ip.split(".")))
        internal, external, lease_s = struct.unpack("!HHI", data[4:])
        if lease_s:
            lease_s = min(lease_s, self.lease_max_s)
            external = self.grant(source.ip, internal, external, lease_s, "NAT-PMP")
        else:
            self.forget(source.ip, internal)
            external = 0
        return head + struct.pack("!HHI", internal, external, lease_s)

    def _ssdp(self, data: bytes) -> bytes | None:
        target = re.search(rb"\nST: (\S+)", data)
        assert target is not None
        if target[1] != f"{IGD}{self.igd_version}".encode():
            return None
        return (
            f"HTTP/1.1 200 OK\r\nST: {IGD}{self.igd_version}\r\n"
            f"LOCATION: {self.location}\r\n\r\n".encode()
        )

    def handle_request(self, request: bytes, client_ip: str) -> bytes:
        if self.http is not None:
            return self.http
        if request.startswith(b"GET"):
            self.log.append("UPnP description")
            return _http(
                200,
                f"<root><service><serviceType>{SERVICE}{self.igd_version}</serviceType>"
                f"<controlURL>{self.control_url}</controlURL></service></root>",
            )
        action = re.search(rb'SOAPAction: "(\S+)#(\w+)"', request)
        assert action is not None
        assert action[1].decode() == f"{SERVICE}{self.igd_version}"
        name = action[2].decode()
        arguments = dict(re.findall(r"<(New\w+)>([^<]*)</", request.decode()))
        self.log.append(f"UPnP {name}")
        code = self.soap_faults.get(name) or self._act(name, arguments)
        if isinstance(code, int):
            return _http(500, f"<Fault><errorCode>{code}</errorCode></Fault>")
        inner = "".join(f"<{key}>{value}</{key}>" for key, value in code.items())
        return _http(200, f'<u:{name}Response xmlns:u="{SERVICE}1">{inner}</u:{name}Response>')

    def _act(self, name: str, arguments: dict[str, str]) -> dict[str, object] | int:
        if name == "GetExternalIPAddress":
            return {"NewExternalIPAddress": self.external_ip}
        port = int(arguments["NewExternalPort"])
        entry = self.mappings.get(port)
        if entry is not None and entry[3] <= trio.current_time():
            entry = None
        if name == "GetSpecificPortMappingEntry":
            if entry is None:
                return 714
            left_s = entry[3] - trio.current_time()
            return {
                "NewInternalPort": entry[1],
                "NewInternalClient": entry[0],
                "NewPortMappingDescription": entry[2],
                "NewLeaseDuration": 0 if left_s == float("inf") else round(left_s),
            }
        if name == "DeletePortMapping":
            return {} if self.mappings.pop(port, None) else 714
        assert name in ("AddPortMapping", "AddAnyPortMapping")
        client = (arguments["NewInternalClient"], int(arguments["NewInternalPort"]))
        if name == "AddPortMapping" and entry is not None and entry[:2] != client:
            return 718
        lease_s = float(arguments["NewLeaseDuration"]) or float("inf")
        if self.lease_max_s == 0:  # it takes no notice
            lease_s = float("inf")
        text = arguments["NewPortMappingDescription"]
        port = self.grant(*client, port, lease_s, text)
        return {"NewReservedPort": port} if name == "AddAnyPortMapping" else {}


def _http(status: int, body: str) -> bytes:
    return (f"HTTP/1.1 {status} Whatever\r\nContent-Length: {len(body)}\r\n\r\n{body}").encode()


class FakePort:
    """A UDP port on the gateway's link."""

    def __init__(self, local: Endpoint, network: FakeReachNetwork) -> None:
        self.local_endpoint = local
        self.statistics = PortStatistics()
        self._network = network
        self._send, self._receive = trio.open_memory_channel[Arrival](1000)

    def send(self, data, destination, *, ttl=None):
        network = self._network
        for forged in network.forged:
            self._send.send_nowait(forged)
        answer = network.fake.handle_datagram(data, self.local_endpoint, destination)
        if answer is not None:
            answer = network.spoil(answer)
            for _ in range(network.copy_count):
                self._send.send_nowait(Arrival(answer, Endpoint(HOME.ip, destination.port)))

    async def receive_batch(self):
        return [await self._receive.receive()]

    def close(self):
        self._network.open_count -= 1


class FakeReachNetwork:
    """UDP and TCP towards the fake gateway."""

    def __init__(self, fake: FakeGateway, nursery: trio.Nursery) -> None:
        self.fake = fake
        self.forged: list[Arrival] = []
        self.spoil = lambda answer: answer
        self.open_count = 0
        self.drip_s = 0.0
        self.copy_count = 1
        self._nursery = nursery
        self._next_port = 50_000

    def bind(self, local):
        assert local == Endpoint(HOME.local_ip, 0)
        self._next_port += 1
        self.open_count += 1
        return FakePort(Endpoint(local.ip, self._next_port), self)

    async def connect(self, local_ip, remote):
        assert (local_ip, remote.ip) == (HOME.local_ip, HOME.ip)
        if UPNP not in self.fake.speaks or f":{remote.port}/" not in self.fake.location:
            raise ConnectionRefusedError(111, "Connection refused")
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self._serve, theirs, local_ip)
        return ours

    async def _serve(self, stream, client_ip):
        request = b""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while b"\r\n\r\n" not in request or (
                b"POST" in request and b"Envelope>\r" not in request
            ):
                chunk = await stream.receive_some()
                if not chunk:
                    return
                request += chunk
            response = self.fake.handle_request(request, client_ip)
            if self.drip_s:
                for index in range(len(response)):
                    await stream.send_all(response[index : index + 1])
                    await trio.sleep(self.drip_s)
            await stream.send_all(response)
            await stream.aclose()
