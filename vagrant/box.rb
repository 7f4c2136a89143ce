# The box's own Vagrantfile: boots the kernel that lies beside it, with virtualisation where the host has it.
Vagrant.configure("2") do |config|
  here = File.dirname(File.expand_path(__FILE__))
  virtualised = File.readable?("/dev/kvm") && File.read("/proc/cpuinfo").match?(/^flags.*\b(vmx|svm)\b/)
  config.vm.boot_timeout = 600
  config.vm.provider :libvirt do |machine|
    if virtualised
      machine.cpu_mode = "host-passthrough"
    else
      machine.driver = "qemu" # software emulation
      machine.cpu_mode = "custom"
      machine.cpu_model = "qemu64"
    end
    machine.machine_type = "q35"
    machine.kernel = "#{here}/vmlinuz"
    machine.initrd = "#{here}/initrd"
    machine.cmd_line = "root=/dev/vda rw console=ttyS0 net.ifnames=0 mitigations=off"
    machine.disk_bus = "virtio"
    machine.graphics_type = "none"
    machine.video_type = "none"
    machine.random model: "random"
  end
end
