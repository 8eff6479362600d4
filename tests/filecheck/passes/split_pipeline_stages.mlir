// RUN: furiosa-llm opt %s --passes "split-pipeline-stages{blocks=1,1}" | filecheck %s

// The stream goes from stage to stage; what the host gives and takes, and parameters, do not.
nn.parameter @w0 : tensor<4x4xf32>
nn.parameter @w1 : tensor<4x4xf32>
func.func @forward(%x: tensor<1x2x4xf32>) -> (tensor<1x2x4xf32>, tensor<1x2x4xf32>) {
  %w0 = nn.get_parameter @w0 : tensor<4x4xf32>
  %w1 = nn.get_parameter @w1 : tensor<4x4xf32>
  %a = func.call @block(%x, %w0) : (tensor<1x2x4xf32>, tensor<4x4xf32>) -> tensor<1x2x4xf32> loc("layers.0")
  %b = func.call @block(%a, %w1) : (tensor<1x2x4xf32>, tensor<4x4xf32>) -> tensor<1x2x4xf32> loc("layers.1")
  func.return %b, %a : tensor<1x2x4xf32>, tensor<1x2x4xf32>
}
func.func private @block(%x: tensor<1x2x4xf32>, %w: tensor<4x4xf32>) -> tensor<1x2x4xf32> {
  %0 = nn.linear %x, %w : tensor<1x2x4xf32>, tensor<4x4xf32> -> tensor<1x2x4xf32>
  %1 = nn.reshape %0 : tensor<1x2x4xf32> -> tensor<1x1x2x4xf32>
  %2 = nn.attention %1, %1, %1 scale 1.0 causal : tensor<1x1x2x4xf32>, tensor<1x1x2x4xf32>, tensor<1x1x2x4xf32> -> tensor<1x2x1x4xf32>
  %3 = nn.reshape %2 : tensor<1x2x1x4xf32> -> tensor<1x2x4xf32>
  func.return %3 : tensor<1x2x4xf32>
}
// CHECK:      builtin.module attributes {dist.mesh = #dist.mesh<1, 2>} {
// CHECK:        %a = func.call @block(%x, %w0)
// CHECK-NEXT:   dist.send %a to 1 : tensor<1x2x4xf32> loc("layers.0")
// CHECK-NEXT:   [[A:%.*]] = dist.recv from 0 : tensor<1x2x4xf32> loc("layers.1")
// CHECK-NEXT:   %b = func.call @block([[A]], %w1)
// CHECK-NEXT:   func.return %b, %a
